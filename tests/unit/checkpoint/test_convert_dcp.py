"""Import of what plain DCP wrote, export to what plain DCP reads."""

import os
import pickle
import random
import zipfile
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.convert.dcp import export_dcp, import_dcp
from everstep.checkpoint.convert.dcp_pickle import DcpFormatError, read_metadata_file
from everstep.checkpoint.convert.dcp_source import DcpSource
from everstep.checkpoint.errors import CheckpointError, LayoutError
from everstep.checkpoint.step_reader import StepReader
from everstep.checkpoint.torch_layout import DTYPE_NAMES
from everstep.checkpoint.views.dcp import StorageReader, StorageWriter
from everstep.checkpoint.views.dcp_contents import contents_of
from tests.support.checkpoints import Counter, bits, fresh_state, tiny_state

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is "),
    pytest.mark.filterwarnings("ignore:ComplexHalf support"),
]


def _state() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "model": {"w": torch.randn(5, 4), "t": torch.randn(6, 3).T, "none": torch.empty(0, 2)},
        "scalar": torch.tensor(2.5),
        "all": {str(d)[6:]: (torch.arange(32) % 2).byte().view(d) for d in DTYPE_NAMES},
        "plain": [1, 2.5, ("a", None)],
        "free": {1, 2},
    }


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor):
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    return bool(type(a) is type(b) and a == b)


def _plain(path: Path, state: Any) -> Path:
    dcp.save(state, storage_writer=FileSystemWriter(path, single_file_per_rank=False))
    return path


def _open(root: Path) -> StepReader:
    directory = CheckpointDirectory(root)
    step_id = directory.find(None)
    assert step_id is not None
    return StepReader(directory.step_path(step_id), directory.manifest(step_id))


def _everything(reader: Any) -> dict[str, Any]:
    return _load_state_dict_from_keys(storage_reader=reader)


def test_import(tmp_path: Path) -> None:
    told: list[int] = []
    source = _plain(tmp_path / "plain", _state())
    step_id = import_dcp(source, tmp_path / "ours", step=7, on_bytes=told.append)
    assert step_id == (1, 7)
    assert told == sorted(told)
    assert _equal(_everything(StorageReader(tmp_path / "ours")), _state())
    with _open(tmp_path / "ours") as reader:
        for pack in range(len(reader.manifest.packs)):
            reader.verify(pack)
        contents = contents_of(reader.manifest, "here")
        assert told[-1] == sum(p.data_bytes for p in reader.manifest.packs)
    assert set(contents.raw) == {"free"}
    assert contents.plain == {"plain": [1, 2.5, {"$tuple": ["a", None]}]}


def test_export(tmp_path: Path) -> None:
    dcp.save(_state(), storage_writer=StorageWriter(tmp_path / "ours"))
    told: list[int] = []
    with _open(tmp_path / "ours") as reader:
        export_dcp(reader, tmp_path / "plain", piece_bytes=24, on_bytes=told.append)
    assert told == sorted(told)
    found = _everything(FileSystemReader(tmp_path / "plain"))
    assert _equal(found, _state())
    state = {"model": {"w": torch.zeros(5, 4)}, "free": None}
    dcp.load(state, checkpoint_id=tmp_path / "plain")
    assert torch.equal(state["model"]["w"], _state()["model"]["w"])  # type: ignore[index]
    assert state["free"] == {1, 2}


def test_an_export_comes_back(tmp_path: Path) -> None:
    """A run's own checkpoint, through DCP's format in small chunks, bit for bit."""
    state = tiny_state(counter=Counter(3))
    with Checkpointer(tmp_path / "run") as run:
        run.save(0, state)
    with _open(tmp_path / "run") as reader:
        export_dcp(reader, tmp_path / "plain", piece_bytes=500)
        import_dcp(tmp_path / "plain", tmp_path / "back")
        with _open(tmp_path / "back") as back:
            assert back.manifest.tensors.keys() == reader.manifest.tensors.keys()
            for name, stored in reader.manifest.tensors.items():
                assert back.manifest.tensors[name].spec == stored.spec
                assert back.read(name).tobytes() == reader.read(name).tobytes()
    fresh = fresh_state()
    sd: dict[str, Any] = {"model": fresh.model.state_dict(), "object.counter": None}
    dcp.load(sd, checkpoint_id=tmp_path / "plain")
    fresh.model.load_state_dict(sd["model"])
    assert bits(fresh)["model.0.weight"] == bits(state)["model.0.weight"]
    assert sd["object.counter"] == {"value": 3}


def test_names_can_change(tmp_path: Path) -> None:
    source = _plain(tmp_path / "plain", {"a": {"x": torch.ones(2), "n": 1}})
    import_dcp(source, tmp_path / "ours", rename=lambda name: f"model.{name[2:]}")
    assert _everything(StorageReader(tmp_path / "ours")).keys() == {"model.x", "model.n"}
    with pytest.raises(CheckpointError, match="would both be named"):
        import_dcp(source, tmp_path / "other", rename=lambda name: "same")
    assert not (tmp_path / "other").exists()


def test_places_that_are_taken(tmp_path: Path) -> None:
    source = _plain(tmp_path / "plain", {"x": torch.ones(2)})
    import_dcp(source, tmp_path / "ours")
    with pytest.raises(CheckpointError, match="into another directory"):
        import_dcp(source, tmp_path / "ours")
    with _open(tmp_path / "ours") as reader, pytest.raises(CheckpointError, match="not empty"):
        export_dcp(reader, source)


def test_a_source_reads_chunks(tmp_path: Path) -> None:
    state = _state()
    source = DcpSource(_plain(tmp_path / "plain", state))
    (box,) = source.chunks["model.t"]
    assert box == source.tensors["model.t"].whole
    assert torch.equal(source.chunk("model.t", box), state["model"]["t"])
    with pytest.raises(KeyError):
        source.chunk("model.q", box)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/everstep-was-here",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Metadata({}, planner_data={"x": Evil()})),
        pickle.dumps(Evil()),
        pickle.dumps({}),
        pickle.dumps(Metadata({"x": 3}, storage_data={})),  # type: ignore[dict-item]
        b"",
        b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f",  # a bytearray of 2**63 bytes
        b"\x80\x05r\xff\xff\xff\xff",  # place 2**32 of the memo
        b"cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"\x80\x02cbuiltins\ngetattr\n(S'text'\nS'upper'\ntR.",
        b"\x80\x02cbuiltins\ngetattr\n(ctorch\nfloat32\nS'itemsize'\ntR.",
    ],
)
def test_hostile_metadata_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(DcpFormatError):
        DcpSource(tmp_path)
    assert not os.path.exists("/tmp/everstep-was-here")


class _OldPickler(pickle.Pickler):
    """Writes enumerations as Python 3.11.0 to 3.11.3 does."""

    def reducer_override(self, obj: Any) -> Any:
        return (getattr, (type(obj), obj.name)) if isinstance(obj, Enum) else NotImplemented


def test_metadata_of_any_python_is_read(tmp_path: Path) -> None:
    state = _state()
    folder = _plain(tmp_path / "plain", state)
    written = folder / ".metadata"
    metadata = pickle.loads(written.read_bytes())
    with written.open("wb") as f:
        _OldPickler(f).dump(metadata)
    assert b"getattr" in written.read_bytes()
    source = DcpSource(folder)
    (box,) = source.chunks["model.t"]
    assert torch.equal(source.chunk("model.t", box), state["model"]["t"])


def test_reading_metadata_changes_no_class_of_torch(tmp_path: Path) -> None:
    hostile = (
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n"
        b"N}X\x08\x00\x00\x00__init__NstR0\x86b."  # BUILD on the class itself
    )
    before = Metadata.__init__
    (tmp_path / ".metadata").write_bytes(hostile)
    with pytest.raises(DcpFormatError):
        read_metadata_file(tmp_path / ".metadata")
    assert Metadata.__init__ is before


def test_every_damaged_byte_of_metadata_is_harmless(tmp_path: Path) -> None:
    source = _plain(tmp_path / "plain", {"x": torch.ones(2, 3), "n": [1]})
    good = (source / ".metadata").read_bytes()
    rng = random.Random(0)
    for position in range(0, len(good), 3):
        bad = bytearray(good)
        bad[position] ^= 1 << rng.randrange(8)
        (source / ".metadata").write_bytes(bad)
        try:
            DcpSource(source)
        except (DcpFormatError, LayoutError):
            continue
    for end in range(0, len(good), 7):
        (source / ".metadata").write_bytes(good[:end])
        with pytest.raises(DcpFormatError):
            DcpSource(source)


def test_paths_do_not_leave_the_directory(tmp_path: Path) -> None:
    source = _plain(tmp_path / "plain", {"x": torch.ones(2)})
    metadata = pickle.loads((source / ".metadata").read_bytes())
    for path in ("/etc/passwd", "../x", "a/../../x", ""):
        for info in metadata.storage_data.values():
            info.relative_path = path
        (source / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(DcpFormatError, match="outside the directory"):
            DcpSource(source)


@pytest.mark.parametrize("damage", ["gone", "short", "flipped", "shape", "hole", "zipped"])
def test_a_damaged_source_leaves_nothing(tmp_path: Path, damage: str) -> None:
    source = _plain(tmp_path / "plain", {"x": torch.ones(40), "y": torch.ones(2, 2)})
    metadata = pickle.loads((source / ".metadata").read_bytes())
    files = {index.fqn: info for index, info in metadata.storage_data.items()}
    file = source / files["x"].relative_path
    if damage == "gone":
        file.unlink()
    elif damage == "short":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "flipped":
        file.write_bytes(bytes(file.stat().st_size))
    elif damage == "zipped":
        with zipfile.ZipFile(file) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
        files["x"].length = file.stat().st_size
    elif damage == "shape":
        files["x"].relative_path, files["y"].relative_path = (
            files["y"].relative_path,
            files["x"].relative_path,
        )
    else:
        [chunk] = metadata.state_dict_metadata["x"].chunks
        chunk.sizes = torch.Size([39])
    (source / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(LayoutError if damage == "hole" else DcpFormatError):
        import_dcp(source, tmp_path / "ours")
    assert CheckpointDirectory(tmp_path / "ours").committed() == []
    assert not list((tmp_path / "ours").glob("step-*"))


def test_an_object_that_attacks_is_carried_and_never_opened(tmp_path: Path) -> None:
    class Planner(DefaultSavePlanner):
        def transform_object(self, write_item: Any, object: Any) -> Any:
            data = super().transform_object(write_item, object)
            if write_item.index.fqn == "evil":
                data.seek(0)
                data.truncate()
                data.write(pickle.dumps(Evil()))
            return data

    dcp.save({"evil": 1, "x": torch.ones(1)}, checkpoint_id=tmp_path / "plain", planner=Planner())
    import_dcp(tmp_path / "plain", tmp_path / "ours")
    assert not os.path.exists("/tmp/everstep-was-here")
    with _open(tmp_path / "ours") as reader:
        assert reader.read("evil").tobytes() == pickle.dumps(Evil())


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    dcp.save(_state(), storage_writer=StorageWriter(tmp_path / "ours"))
    [pack] = (tmp_path / "ours").rglob("rank-*")
    pack.unlink()
    with _open(tmp_path / "ours") as reader, pytest.raises(CheckpointError):
        export_dcp(reader, tmp_path / "plain")
    assert not list((tmp_path / "plain").iterdir())
