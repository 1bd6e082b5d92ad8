"""torch DCP saves and loads through our storage, in one process."""

import enum
import io
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.errors import CheckpointError, LayoutError, PackHeaderError
from everstep.checkpoint.layout import Box
from everstep.checkpoint.lock import DirectoryLock
from everstep.checkpoint.step_reader import StepReader
from everstep.checkpoint.torch_layout import DTYPE_NAMES
from everstep.checkpoint.views import dcp_reader, dcp_versions
from everstep.checkpoint.views.dcp import LoadPlanner, SavePlanner, StorageReader, StorageWriter
from everstep.checkpoint.views.dcp_contents import contents_of
from everstep.checkpoint.views.dcp_reader import pieces
from tests.support.checkpoints import Counter, bits, fresh_state, tiny_state

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is ")


class Colour(enum.IntEnum):
    RED = 1


def _state(seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    matrix = torch.randn(6, 8)
    return {
        "model": {"w": matrix, "turned": matrix.T, "every": matrix[::2, 1::3]},
        "scalar": torch.tensor(float(seed)),
        "nothing": torch.empty(0, 3),
        "groups": [{"lr": 0.1 + seed, "betas": (0.9, 0.95)}, {"moment": torch.arange(5)}],
        "limits": [float("inf"), None, True, ({3: 1}, 2)],
        "colour": Colour.RED,
        "free": complex(1, seed),
    }


def _save(path: Path, state: dict[str, Any], **options: Any) -> None:
    dcp.save(state, storage_writer=StorageWriter(path), no_dist=True, **options)


def _load(path: Path, state: dict[str, Any], **options: Any) -> dict[str, Any]:
    dcp.load(state, storage_reader=StorageReader(path), no_dist=True, **options)
    return state


def _everything(path: Path) -> dict[str, Any]:
    return _load_state_dict_from_keys(storage_reader=StorageReader(path))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and bool(a == b)


def _blank(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {k: _blank(v) for k, v in value.items()}
    return [_blank(v) for v in value] if isinstance(value, list) else None


def _cause(raised: pytest.ExceptionInfo[CheckpointException]) -> BaseException:
    return raised.value.failures[0][0]


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    state = _state()
    _save(tmp_path / "a", state)
    blank = _blank(state)
    assert _same(_load(tmp_path / "a", blank), state)


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(24).reshape(4, 6).to(dtype)
    _save(tmp_path, {"t": tensor, "zero": tensor[:0]})
    found = _load(tmp_path, {"t": torch.empty_like(tensor), "zero": tensor[:0].clone()})
    assert found["t"].view(torch.uint8).equal(tensor.view(torch.uint8))


def test_no_pickle_is_kept_of_what_json_can_say(tmp_path: Path) -> None:
    _save(tmp_path, _state())
    held = dcp_versions.hold(tmp_path)
    contents = contents_of(held.manifest, held.path)
    held.close()
    assert set(contents.raw) == {"colour", "free"}
    assert contents.plain["groups.0.lr"] == 0.1
    assert contents.plain["limits"][0] == {"$float": "inf"}


def test_other_tools_of_ours_read_it(tmp_path: Path) -> None:
    state = _state()
    _save(tmp_path, state)
    directory = CheckpointDirectory(tmp_path)
    step_id = directory.find(None)
    assert step_id is not None
    with StepReader(directory.step_path(step_id), directory.manifest(step_id)) as reader:
        reader.verify(0)
        found = reader.read("model.turned", Box((1, 2), (3, 2))).tobytes()
    assert found == state["model"]["turned"][1:4, 2:4].contiguous().numpy().tobytes()


def test_dcp_rebuilds_a_state_from_our_metadata(tmp_path: Path) -> None:
    state = _state()
    _save(tmp_path, state)
    assert _same(_everything(tmp_path), state)
    part = _load_state_dict_from_keys({"model"}, storage_reader=StorageReader(tmp_path))
    assert _same(part, {"model": state["model"]})
    described = StorageReader(tmp_path).read_metadata().state_dict_metadata
    assert isinstance(described["model.w"], TensorStorageMetadata)
    assert isinstance(described["groups.0.lr"], BytesStorageMetadata)


def test_a_save_replaces_the_one_before(tmp_path: Path) -> None:
    for seed in range(4):
        _save(tmp_path, _state(seed))
        assert _same(_everything(tmp_path), _state(seed))
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["generations", "incoming", "lock", "step-00000003-g00004"]
    assert [p.name for p in (tmp_path / "generations").iterdir()] == ["00004.json"]
    assert not list((tmp_path / "incoming").iterdir())


def test_the_path_of_the_call_counts(tmp_path: Path) -> None:
    writer, reader = StorageWriter(tmp_path / "a"), StorageReader(tmp_path / "a")
    dcp.save({"x": torch.ones(2)}, checkpoint_id=tmp_path / "b", storage_writer=writer)
    assert writer.checkpoint_id == tmp_path / "b"
    state = {"x": torch.zeros(2)}
    dcp.load(state, checkpoint_id=str(tmp_path / "b"), storage_reader=reader)
    assert state["x"].sum() == 2
    assert not (tmp_path / "a").exists()


def test_other_dtypes_and_strides_can_be_loaded_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dcp_reader, "STAGING_BYTES", 64)  # so that it takes several pieces
    whole = torch.randn(5, 7, 3)
    _save(tmp_path, {"t": whole})
    turned = torch.zeros(3, 7, 5, dtype=torch.float64).permute(2, 1, 0)
    _load(tmp_path, {"t": turned})
    assert torch.equal(turned, whole.double())


@pytest.mark.parametrize("limit", [1, 3, 7, 50])
def test_pieces_tile_a_box(limit: int) -> None:
    box = Box((2, 0, 5), (3, 4, 6))
    count = torch.zeros(8, 8, 12, dtype=torch.int64)
    for piece in pieces(box, limit):
        assert 0 < piece.size <= limit
        count[tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))] += 1
    assert count.sum() == box.size
    assert (count[2:5, 0:4, 5:11] == 1).all()


class HalfPlanner(DefaultSavePlanner):
    """DCP's own example: everything is saved in another dtype."""

    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        for item in plan.items:
            if item.tensor_data is not None:
                item.tensor_data.properties.dtype = torch.float16
        return plan

    def resolve_data(self, write_item: Any) -> Any:
        data = super().resolve_data(write_item)
        return data if write_item.type == WriteItemType.BYTE_IO else data.to(torch.float16)


class RenamingPlanner(DefaultLoadPlanner):
    """DCP's own example: the checkpoint has other names."""

    def set_up_planner(
        self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(
            {f"foo_{k}": v for k, v in state_dict.items()}, metadata, is_coordinator
        )


class TellingPlanner(DefaultSavePlanner):
    """Leaves planner data of its own."""

    def create_global_plan(self, all_plans: Any) -> Any:
        plans, metadata = super().create_global_plan(all_plans)
        return plans, replace(metadata, planner_data=["rank 0 was here", (1, 2)])


def test_custom_planners(tmp_path: Path) -> None:
    state = {"x": torch.randn(4), "note": "text"}
    _save(tmp_path / "half", state, planner=HalfPlanner())
    stored = _everything(tmp_path / "half")
    assert _same(stored, {"x": state["x"].half(), "note": "text"})
    assert _same(_load(tmp_path / "half", {"x": torch.zeros(4)})["x"], state["x"].half().float())

    _save(tmp_path / "named", {"foo_x": state["x"]})
    found = {"x": torch.zeros(4)}
    _load(tmp_path / "named", found, planner=RenamingPlanner())
    assert torch.equal(found["x"], state["x"])

    _save(tmp_path / "told", state, planner=TellingPlanner())
    told = StorageReader(tmp_path / "told").read_metadata()
    assert told.planner_data == ["rank 0 was here", (1, 2)]


class CuttingPlanner(DefaultSavePlanner):
    """Saves each row of every matrix as a chunk of its own."""

    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        items = []
        for item in plan.items:
            size = item.tensor_data.size
            for row in range(size[0]):
                chunk = ChunkStorageMetadata(torch.Size((row, 0)), torch.Size((1, size[1])))
                items.append(
                    replace(
                        item,
                        type=WriteItemType.SHARD,
                        index=MetadataIndex(item.index.fqn, chunk.offsets),
                        tensor_data=replace(item.tensor_data, chunk=chunk),
                    )
                )
        return replace(plan, items=items)

    def resolve_data(self, write_item: Any) -> Any:
        row = write_item.index.offset[0]
        return self.state_dict[write_item.index.fqn][row : row + 1]


def test_a_rank_with_several_boxes_of_a_tensor(tmp_path: Path) -> None:
    state = {"x": torch.randn(5, 3), "y": torch.randn(2, 4)}
    _save(tmp_path, state, planner=CuttingPlanner())
    assert _same(_everything(tmp_path), state)
    assert len(list(tmp_path.rglob("rank-*"))) == 5


def test_a_planner_that_caches_its_plans(tmp_path: Path) -> None:
    for seed in range(3):
        state = _state(seed) | {"limits": seed}
        _save(tmp_path / str(seed), state, planner=DefaultSavePlanner(enable_plan_caching=True))
        assert _same(_everything(tmp_path / str(seed)), state)


@pytest.mark.parametrize("cut", ["incoming", "step"])
def test_two_saves_at_once_end_with_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    """A second save begins when the first has written, or while it commits."""
    _save(tmp_path, _state(0))
    original = dcp_versions.commit
    raised: list[BaseException] = []

    def second() -> None:
        monkeypatch.setattr(dcp_versions, "commit", original)
        try:
            _save(tmp_path, _state(2))
        except CheckpointException as e:
            raised.append(e)

    def commit(root: Path, parts: Any) -> Any:
        thread = threading.Thread(target=second)
        if cut == "incoming":
            thread.start()
            thread.join()
            return original(root, parts)
        with DirectoryLock(root):
            thread.start()
            thread.join()
        return original(root, parts)

    monkeypatch.setattr(dcp_versions, "commit", commit)
    if cut == "incoming":
        with pytest.raises(CheckpointException) as info:
            _save(tmp_path, _state(1))
        assert isinstance(_cause(info), dcp_versions.SupersededError)
        assert not raised
        assert _same(_everything(tmp_path), _state(2))
    else:
        _save(tmp_path, _state(1))
        assert "in use" in str(raised[0])
        assert _same(_everything(tmp_path), _state(1))


def test_a_version_is_kept_while_it_is_read(tmp_path: Path) -> None:
    _save(tmp_path, {"x": torch.zeros(3)})
    reader = StorageReader(tmp_path)

    class Slow(DefaultLoadPlanner):
        def create_local_plan(self) -> Any:
            for value in (1.0, 2.0):
                _save(tmp_path, {"x": torch.full((3,), value)})
            return super().create_local_plan()

    state = {"x": torch.full((3,), 9.0)}
    dcp.load(state, storage_reader=reader, planner=Slow(), no_dist=True)
    assert state["x"].tolist() == [0, 0, 0]
    assert _everything(tmp_path)["x"].tolist() == [2, 2, 2]
    _save(tmp_path, {"x": torch.full((3,), 3.0)})
    assert len(CheckpointDirectory(tmp_path).committed()) == 1


def test_a_failed_save_leaves_the_checkpoint_and_no_garbage(tmp_path: Path) -> None:
    _save(tmp_path, _state())

    class Failing(DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            if write_item.index.fqn == "model.w":
                raise OSError(28, "No space left on device")
            return super().resolve_data(write_item)

    with pytest.raises(CheckpointException, match="No space left"):
        _save(tmp_path, _state(1), planner=Failing())
    assert _same(_everything(tmp_path), _state())
    assert not list((tmp_path / "incoming").iterdir())
    _save(tmp_path, _state(2))
    assert _same(_everything(tmp_path), _state(2))


def test_what_a_save_must_not_replace(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as run:
        run.save(0, tiny_state())
    dcp.save({"x": torch.ones(1)}, checkpoint_id=tmp_path / "plain", no_dist=True)
    _save(tmp_path / "mixed", _state())
    with Checkpointer(tmp_path / "mixed") as run:
        run._parent = CheckpointDirectory(tmp_path / "mixed").find(None)
        run.save(7, tiny_state())
    for path in (tmp_path / "run", tmp_path / "plain", tmp_path / "mixed"):
        before = sorted(path.rglob("*"))
        with pytest.raises(CheckpointException, match="choose another path"):
            _save(path, _state())
        assert sorted(path.rglob("*")) == before
    for make in (StorageWriter, StorageReader):
        with pytest.raises(CheckpointError, match="is a URL"):
            make("s3://bucket/path")
        assert not make.validate_checkpoint_id("s3://bucket/path")
        assert make.validate_checkpoint_id(tmp_path)
    with pytest.raises(CheckpointException, match="holds no checkpoint"):
        _load(tmp_path / "nowhere", {"x": torch.ones(1)})
    with pytest.raises(CheckpointError, match="one checkpoint per rank"):
        _save(tmp_path / "b", _state(), use_collectives=False)


def test_a_planner_that_gives_what_it_did_not_plan(tmp_path: Path) -> None:
    class Lying(DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            data = super().resolve_data(write_item)
            return io.BytesIO(b"1") if write_item.index.fqn == "x" else data[:1]

    for name, hint in (("x", "gives a BytesIO"), ("y", "set dtype and sizes")):
        with pytest.raises(CheckpointException, match=hint) as info:
            _save(tmp_path, {name: torch.ones(3)}, planner=Lying())
        assert isinstance(_cause(info), LayoutError)
    assert dcp_versions.CheckpointDirectory(tmp_path).committed() == []


def test_damage_is_found(tmp_path: Path) -> None:
    _save(tmp_path, {"x": torch.ones(3)})
    [pack] = tmp_path.rglob("rank-*")
    data = bytearray(pack.read_bytes())
    data[100] ^= 1
    pack.write_bytes(data)
    with pytest.raises(CheckpointException) as info:
        _load(tmp_path, {"x": torch.zeros(3)})
    assert isinstance(_cause(info), PackHeaderError)


def test_a_damaged_checkpoint_can_be_replaced(tmp_path: Path) -> None:
    _save(tmp_path, {"x": torch.ones(3)})
    [manifest] = tmp_path.rglob("manifest.json")
    manifest.write_bytes(manifest.read_bytes()[:-9])
    with pytest.raises(CheckpointException) as info:
        _load(tmp_path, {"x": torch.zeros(3)})
    assert "cut short" in str(info.value)
    _save(tmp_path, {"x": torch.ones(3)})
    assert _everything(tmp_path)["x"].sum() == 3


def test_a_run_is_read_by_dcp(tmp_path: Path) -> None:
    saved = tiny_state(counter=Counter(7))
    with Checkpointer(tmp_path) as run:
        run.save(3, saved)
        run.save(5, tiny_state(1, counter=Counter(8)))
    state = fresh_state()
    sd: dict[str, Any] = {"model": state.model.state_dict(), "object.counter": None}
    dcp.load(sd, storage_reader=StorageReader(tmp_path, step=3), no_dist=True)
    state.model.load_state_dict(sd["model"])
    models = [{k: v for k, v in bits(s).items() if k[:5] == "model"} for s in (state, saved)]
    assert models[0] == models[1]
    assert sd["object.counter"] == {"value": 7}
    found = _everything(tmp_path)
    assert found["object"]["counter"] == {"value": 8}
    assert found["model"].keys() == saved.model.state_dict().keys()
    assert "groups" in found["object"]["optimizer"]


def test_our_planners_are_the_default_ones_elsewhere(tmp_path: Path) -> None:
    _save(tmp_path, _state(), planner=SavePlanner())
    blank = _blank(_state())
    assert _same(_load(tmp_path, blank, planner=LoadPlanner()), _state())


def test_a_copy_of_a_checkpoint_is_one(tmp_path: Path) -> None:
    _save(tmp_path / "a", _state())
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert _same(_everything(tmp_path / "b"), _state())
    os.remove(next((tmp_path / "b").rglob("manifest.json")))
    with pytest.raises(CheckpointException, match="holds no checkpoint"):
        _everything(tmp_path / "b")
