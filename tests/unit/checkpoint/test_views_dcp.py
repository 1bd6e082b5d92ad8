"""torch DCP saves and loads through our storage, in one process."""

import io
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
from everstep.checkpoint.errors import LayoutError
from everstep.checkpoint.layout import Box
from everstep.checkpoint.step_reader import StepReader
from everstep.checkpoint.torch_layout import DTYPE_NAMES
from everstep.checkpoint.views import dcp_reader, dcp_versions
from everstep.checkpoint.views.dcp import LoadPlanner, SavePlanner, StorageReader, StorageWriter
from everstep.checkpoint.views.dcp_contents import contents_of
from tests.support.checkpoints import Counter, bits, fresh_state, tiny_state
from tests.support.dcp_states import (
    cause_of,
    everything,
    load_dcp,
    nested_state,
    same_state,
    save_dcp,
    zeroed,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is "),
    pytest.mark.filterwarnings("ignore:ComplexHalf support"),
]


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    state = nested_state()
    save_dcp(tmp_path / "a", state)
    blank = zeroed(state)
    assert same_state(load_dcp(tmp_path / "a", blank), state)


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(96, dtype=torch.uint8).view(dtype)[:6].reshape(2, 3)
    save_dcp(tmp_path, {"t": tensor, "zero": tensor[:0]})
    found = load_dcp(tmp_path, {"t": torch.empty_like(tensor), "zero": tensor[:0].clone()})
    assert found["t"].view(torch.uint8).equal(tensor.view(torch.uint8))


def test_no_pickle_is_kept_of_what_json_can_say(tmp_path: Path) -> None:
    save_dcp(tmp_path, nested_state())
    held = dcp_versions.hold(tmp_path)
    contents = contents_of(held.manifest, held.path)
    held.close()
    assert set(contents.raw) == {"colour", "free"}
    assert contents.plain["groups.0.lr"] == 0.1
    assert contents.plain["limits"][0] == {"$float": "inf"}


def test_other_tools_of_ours_read_it(tmp_path: Path) -> None:
    state = nested_state()
    save_dcp(tmp_path, state)
    directory = CheckpointDirectory(tmp_path)
    step_id = directory.find(None)
    assert step_id is not None
    with StepReader(directory.step_path(step_id), directory.manifest(step_id)) as reader:
        reader.verify(0)
        found = reader.read("model.turned", Box((1, 2), (3, 2))).tobytes()
    assert found == state["model"]["turned"][1:4, 2:4].contiguous().numpy().tobytes()


def test_dcp_rebuilds_a_state_from_our_metadata(tmp_path: Path) -> None:
    state = nested_state()
    save_dcp(tmp_path, state)
    assert same_state(everything(tmp_path), state)
    part = _load_state_dict_from_keys({"model"}, storage_reader=StorageReader(tmp_path))
    assert same_state(part, {"model": state["model"]})
    described = StorageReader(tmp_path).read_metadata().state_dict_metadata
    assert isinstance(described["model.w"], TensorStorageMetadata)
    assert isinstance(described["groups.0.lr"], BytesStorageMetadata)


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
    save_dcp(tmp_path, {"t": whole})
    turned = torch.zeros(3, 7, 5, dtype=torch.float64).permute(2, 1, 0)
    load_dcp(tmp_path, {"t": turned})
    assert torch.equal(turned, whole.double())


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
    save_dcp(tmp_path / "half", state, planner=HalfPlanner())
    stored = everything(tmp_path / "half")
    assert same_state(stored, {"x": state["x"].half(), "note": "text"})
    assert same_state(
        load_dcp(tmp_path / "half", {"x": torch.zeros(4)})["x"], state["x"].half().float()
    )

    save_dcp(tmp_path / "named", {"foo_x": state["x"]})
    found = {"x": torch.zeros(4)}
    load_dcp(tmp_path / "named", found, planner=RenamingPlanner())
    assert torch.equal(found["x"], state["x"])

    save_dcp(tmp_path / "told", state, planner=TellingPlanner())
    told = StorageReader(tmp_path / "told").read_metadata()
    assert told.planner_data == ["rank 0 was here", (1, 2)]


class CuttingPlanner(DefaultSavePlanner):
    """Saves each row of every matrix as a chunk of its own, the first one as two: no grid."""

    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        items = []
        for item in plan.items:
            rows, columns = item.tensor_data.size
            parts = [(0, 0, 1), (0, 1, columns - 1), *((row, 0, columns) for row in range(1, rows))]
            for row, column, width in parts:
                chunk = ChunkStorageMetadata(torch.Size((row, column)), torch.Size((1, width)))
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
        row, column = write_item.index.offset
        width = write_item.tensor_data.chunk.sizes[1]
        whole = self.state_dict[write_item.index.fqn]
        return whole[row : row + 1, column : column + width]


def test_a_rank_with_several_boxes_of_a_tensor(tmp_path: Path) -> None:
    state = {"x": torch.randn(5, 3), "y": torch.randn(2, 4)}
    save_dcp(tmp_path, state, planner=CuttingPlanner())
    assert same_state(everything(tmp_path), state)
    assert len(list(tmp_path.rglob("rank-*"))) == 6


def test_a_planner_that_caches_its_plans(tmp_path: Path) -> None:
    for seed in range(3):
        state = nested_state(seed) | {"limits": seed}
        save_dcp(tmp_path / str(seed), state, planner=DefaultSavePlanner(enable_plan_caching=True))
        assert same_state(everything(tmp_path / str(seed)), state)


def test_a_planner_that_gives_what_it_did_not_plan(tmp_path: Path) -> None:
    class Lying(DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            data = super().resolve_data(write_item)
            return io.BytesIO(b"1") if write_item.index.fqn == "x" else data[:1]

    for name, hint in (("x", "gives a BytesIO"), ("y", "set dtype and sizes")):
        with pytest.raises(CheckpointException, match=hint) as info:
            save_dcp(tmp_path, {name: torch.ones(3)}, planner=Lying())
        assert isinstance(cause_of(info), LayoutError)
    assert dcp_versions.CheckpointDirectory(tmp_path).committed() == []


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
    found = everything(tmp_path)
    assert found["object"]["counter"] == {"value": 8}
    assert found["model"].keys() == saved.model.state_dict().keys()
    assert "groups" in found["object"]["optimizer"]


def test_our_planners_are_the_default_ones_elsewhere(tmp_path: Path) -> None:
    save_dcp(tmp_path, nested_state(), planner=SavePlanner())
    blank = zeroed(nested_state())
    assert same_state(load_dcp(tmp_path, blank, planner=LoadPlanner()), nested_state())
