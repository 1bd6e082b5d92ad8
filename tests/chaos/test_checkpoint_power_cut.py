"""The power fails at any point of a save, and the disk keeps any part of what was not synced."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.errors import CheckpointError
from everstep.checkpoint.torch_state import State
from tests.support.checkpoints import Counter, bits
from tests.support.recorded_files import (
    BYTES,
    NAMES,
    Changes,
    Op,
    Recording,
    recording,
    replay,
    unsynced,
)

pytestmark = pytest.mark.chaos


def _state(value: float) -> State:
    model = nn.Linear(2, 2)
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return State(model=model, data=Counter(value))


@pytest.fixture(params=["first", pytest.param("newest", marks=pytest.mark.slow), "fork"])
def recorded(
    request: pytest.FixtureRequest, tmp_path: Path
) -> tuple[Path, Recording, dict[int, dict[str, bytes]], set[int | None]]:
    """A folder before a save of step 3, what the save did, all states, and what may be newest."""
    root, base, wanted = tmp_path / "live", tmp_path / "base", dict[int, dict[str, bytes]]()
    root.mkdir()
    if request.param != "first":
        with Checkpointer(root, keep=9) as checkpointer:
            for step in (1, 2):
                checkpointer.save(step, _state(step))
                wanted[step] = bits(_state(step))
    wanted[3] = bits(_state(3))
    with Checkpointer(root, keep=1) as checkpointer:
        if request.param != "first":
            checkpointer.load(_state(0), 1 if request.param == "fork" else None)
        else:
            checkpointer.load(_state(0))
        shutil.copytree(root, base)
        with recording(root) as done:
            checkpointer.save(3, _state(3))
    old: set[int | None] = {"first": {None}, "newest": {2}, "fork": {1, 2}}[request.param]
    return base, done, wanted, old


def _found(root: Path, wanted: dict[int, dict[str, bytes]]) -> int | None:
    """The newest step that a reader sees; every step that it sees is whole."""
    for step_id in CheckpointDirectory(root).lineage():
        state = _state(0)
        with Checkpointer(root, read_only=True) as reader:
            reader.load(state, step_id.step)
            assert bits(state) == wanted[step_id.step]
            assert state.objects["data"].state_dict() == {"value": step_id.step}
    with Checkpointer(root, read_only=True) as reader:
        return reader.latest()


def _variants(ops: list[Op]) -> Iterator[set[int]]:
    """What may be lost of a prefix: nothing, all, all bytes, all names, each alone, and by chance.

    Of several changes to the bytes of one file, any may be lost.
    """
    lost = unsynced(ops)
    yield set()
    yield set(lost)
    yield {i for i in lost if ops[i].kind in BYTES}
    yield {i for i in lost if ops[i].kind in NAMES}
    for index in lost:
        yield {index}
        yield set(lost) - {index}
    for seed in range(4):
        chance = random.Random(seed)
        yield {i for i in lost if chance.random() < 0.5}


@pytest.mark.timeout(300)
def test_the_old_step_or_the_new_one_whole(
    tmp_path: Path,
    recorded: tuple[Path, Recording, dict[int, dict[str, bytes]], set[int | None]],
) -> None:
    base, done, wanted, old = recorded
    ops = done.ops
    kinds = [op.kind for op in ops]
    assert {"create", "write", "link", "sync", "sync_folder"} <= set(kinds)
    published = next(
        i for i, op in enumerate(ops) if op.kind == "link" and op.path.endswith("manifest.json")
    )
    settled = next(i for i in range(published, len(ops)) if kinds[i] == "sync_folder")
    tried = dict[Changes, int | None]()
    for end in range(len(ops) + 1):
        for dropped in _variants(ops[:end]):
            changes = replay(ops[:end], dropped)
            if changes not in tried:
                folder = tmp_path / "replayed"
                changes.apply(base, folder)
                try:
                    tried[changes] = _found(folder, wanted)
                except CheckpointError as e:
                    raise AssertionError(f"after {ops[:end][-3:]} without {dropped}: {e}") from e
                shutil.rmtree(folder)
            found = tried[changes]
            if end <= published:
                assert found in old
            elif end > settled:
                assert found == 3
            else:
                assert found in {*old, 3}
    assert set(tried.values()) >= {3, *(old if old == {None} else {2})}
    assert len(tried) > 50


def test_the_recording_tells_what_is_there(
    tmp_path: Path,
    recorded: tuple[Path, Recording, dict[int, dict[str, bytes]], set[int | None]],
) -> None:
    base, done, _, _ = recorded
    replay(done.ops, set()).apply(base, tmp_path / "replayed")

    def files(root: Path) -> dict[str, bytes]:
        found = (p for p in root.rglob("*") if p.is_file() and p.name != "lock")
        return {str(p.relative_to(root)): p.read_bytes() for p in found}

    assert files(tmp_path / "replayed") == files(done.root)
    assert files(base) != files(done.root)
