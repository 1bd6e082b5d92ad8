"""A path of torch DCP is one checkpoint: what replaces it, and what is never lost."""

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.errors import CheckpointError, PackHeaderError
from everstep.checkpoint.lock import DirectoryLock
from everstep.checkpoint.views import dcp_versions
from everstep.checkpoint.views.dcp import StorageReader, StorageWriter
from tests.support.checkpoints import tiny_state
from tests.support.dcp_states import (
    cause_of,
    everything,
    load_dcp,
    nested_state,
    same_state,
    save_dcp,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is "),
    pytest.mark.filterwarnings("ignore:ComplexHalf support"),
]


def test_a_save_replaces_the_one_before(tmp_path: Path) -> None:
    for seed in range(4):
        save_dcp(tmp_path, nested_state(seed))
        assert same_state(everything(tmp_path), nested_state(seed))
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["generations", "incoming", "lock", "step-00000003-g00004"]
    assert [p.name for p in (tmp_path / "generations").iterdir()] == ["00004.json"]
    assert not list((tmp_path / "incoming").iterdir())


@pytest.mark.parametrize("cut", ["incoming", "step"])
def test_two_saves_at_once_end_with_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    """A second save begins when the first has written, or while it commits."""
    save_dcp(tmp_path, nested_state(0))
    original = dcp_versions.commit
    raised: list[BaseException] = []

    def second() -> None:
        monkeypatch.setattr(dcp_versions, "commit", original)
        try:
            save_dcp(tmp_path, nested_state(2))
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
            save_dcp(tmp_path, nested_state(1))
        assert isinstance(cause_of(info), dcp_versions.SupersededError)
        assert not raised
        assert same_state(everything(tmp_path), nested_state(2))
    else:
        save_dcp(tmp_path, nested_state(1))
        assert "in use" in str(raised[0])
        assert same_state(everything(tmp_path), nested_state(1))


def test_a_version_is_kept_while_it_is_read(tmp_path: Path) -> None:
    save_dcp(tmp_path, {"x": torch.zeros(3)})
    reader = StorageReader(tmp_path)

    class Slow(DefaultLoadPlanner):
        def create_local_plan(self) -> Any:
            for value in (1.0, 2.0):
                save_dcp(tmp_path, {"x": torch.full((3,), value)})
            return super().create_local_plan()

    state = {"x": torch.full((3,), 9.0)}
    dcp.load(state, storage_reader=reader, planner=Slow(), no_dist=True)
    assert state["x"].tolist() == [0, 0, 0]
    assert everything(tmp_path)["x"].tolist() == [2, 2, 2]
    save_dcp(tmp_path, {"x": torch.full((3,), 3.0)})
    assert len(CheckpointDirectory(tmp_path).committed()) == 1


def test_a_failed_save_leaves_the_checkpoint_and_no_garbage(tmp_path: Path) -> None:
    save_dcp(tmp_path, nested_state())

    class Failing(DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            if write_item.index.fqn == "model.w":
                raise OSError(28, "No space left on device")
            return super().resolve_data(write_item)

    with pytest.raises(CheckpointException, match="No space left"):
        save_dcp(tmp_path, nested_state(1), planner=Failing())
    assert same_state(everything(tmp_path), nested_state())
    assert not list((tmp_path / "incoming").iterdir())
    save_dcp(tmp_path, nested_state(2))
    assert same_state(everything(tmp_path), nested_state(2))


def test_what_a_save_must_not_replace(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as run:
        run.save(0, tiny_state())
    dcp.save({"x": torch.ones(1)}, checkpoint_id=tmp_path / "plain", no_dist=True)
    shutil.copytree(tmp_path / "run", tmp_path / "mixed")
    (tmp_path / "mixed" / "incoming").mkdir()  # as if both had been used with this path
    for path in (tmp_path / "run", tmp_path / "plain", tmp_path / "mixed"):
        before = sorted(path.rglob("*"))
        with pytest.raises(CheckpointException, match="choose another path"):
            save_dcp(path, nested_state())
        assert sorted(path.rglob("*")) == before
    for make in (StorageWriter, StorageReader):
        with pytest.raises(CheckpointError, match="is a URL"):
            make("s3://bucket/path")
        assert not make.validate_checkpoint_id("s3://bucket/path")
        assert make.validate_checkpoint_id(tmp_path)
    with pytest.raises(CheckpointException, match="holds no checkpoint"):
        load_dcp(tmp_path / "nowhere", {"x": torch.ones(1)})
    with pytest.raises(CheckpointError, match="one checkpoint per rank"):
        save_dcp(tmp_path / "b", nested_state(), use_collectives=False)


def test_damage_is_found(tmp_path: Path) -> None:
    save_dcp(tmp_path, {"x": torch.ones(3)})
    [pack] = tmp_path.rglob("rank-*")
    data = bytearray(pack.read_bytes())
    data[100] ^= 1
    pack.write_bytes(data)
    with pytest.raises(CheckpointException) as info:
        load_dcp(tmp_path, {"x": torch.zeros(3)})
    assert isinstance(cause_of(info), PackHeaderError)


def test_a_damaged_checkpoint_can_be_replaced(tmp_path: Path) -> None:
    save_dcp(tmp_path, {"x": torch.ones(3)})
    [manifest] = tmp_path.rglob("manifest.json")
    manifest.write_bytes(manifest.read_bytes()[:-9])
    with pytest.raises(CheckpointException) as info:
        load_dcp(tmp_path, {"x": torch.zeros(3)})
    assert "cut short" in str(info.value)
    save_dcp(tmp_path, {"x": torch.ones(3)})
    assert everything(tmp_path)["x"].sum() == 3


def test_a_copy_of_a_checkpoint_is_one(tmp_path: Path) -> None:
    save_dcp(tmp_path / "a", nested_state())
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert same_state(everything(tmp_path / "b"), nested_state())
    os.remove(next((tmp_path / "b").rglob("manifest.json")))
    with pytest.raises(CheckpointException, match="holds no checkpoint"):
        everything(tmp_path / "b")
