"""A flushing process killed before every single file operation, then told to flush again."""

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.errors import CheckpointError, SaveFailedError
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.snapshots.flush import flush_slot
from everstep.checkpoint.snapshots.memory import FlushOrder
from everstep.checkpoint.step_keys import part_key
from tests.support.checkpoints import step_names
from tests.support.kills import die_before, in_process
from tests.support.recorded_files import recording, unsynced
from tests.support.slots import holds, sealed_slot

pytestmark = pytest.mark.chaos

OLD, NEW = StepId(1, 1), StepId(1, 2)


def _order(root: Path, rank: int, world_size: int, step_id: StepId = NEW) -> FlushOrder:
    return FlushOrder(
        directory=str(root), step_id=step_id, rank=rank, world_size=world_size, keep=1
    )


def _flush_all(root: Path, world_size: int, step_id: StepId = NEW) -> None:
    def one(rank: int) -> None:
        slot = sealed_slot(step_id, rank, world_size)
        flush_slot(slot, _order(root, rank, world_size, step_id))

    with ThreadPoolExecutor(world_size) as pool:
        list(pool.map(one, range(world_size)))


def _flush_until(root: Path, rank: int, world_size: int, kill_at: int) -> None:
    """Dies before change number ``kill_at``, which a file beside the root names; else ends.

    One rank of several ends when it has voted: the others are not there.
    """
    slot = sealed_slot(NEW, rank, world_size)
    vote = root / part_key(NEW, rank)
    lines = die_before(kill_at)
    with contextlib.suppress(CheckpointError):
        flush_slot(
            slot,
            _order(root, rank, world_size),
            cancelled=lambda: world_size > 1 and vote.exists(),
        )
    root.with_name("changes").write_text("\n".join(lines))


def _die_everywhere(base: Path, folder: Path, rank: int, world_size: int) -> None:
    """Runs in a process of its own, which forks for each change one that dies before it."""

    def forked(kill_at: int) -> int:
        shutil.copytree(base, folder / str(kill_at))
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                _flush_until(folder / str(kill_at), rank, world_size, kill_at)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert forked(-1) == 0
    for kill_at in range(len((folder / "changes").read_text().split("\n"))):
        assert forked(kill_at) == -signal.SIGKILL


def _whole_steps(root: Path, world_size: int) -> list[StepId]:
    directory = CheckpointDirectory(root)
    steps = directory.lineage()
    for step_id in steps:
        with directory.reader(step_id) as reader:
            for pack in range(world_size):
                reader.verify(pack)
            assert holds(reader, step_id, world_size)
    return steps


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """What a process wrote outlives it on any file system: one that is fast will do."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_killed_before_any_change_and_done_again(
    memory_folder: Path, rank: int, world_size: int
) -> None:
    base, folder = memory_folder / "base", memory_folder / "killed"
    CheckpointDirectory(base).create_generation(None, {})
    _flush_all(base, world_size, OLD)
    assert in_process(_die_everywhere, base, folder, rank, world_size) == 0
    changes = (folder / "changes").read_text().split("\n")
    assert len([c for c in changes if c.startswith("write")]) >= 3
    seen = set()
    for kill_at, change in enumerate(changes):
        where = folder / str(kill_at)
        seen.add(tuple(_whole_steps(where, world_size)))
        _flush_all(where, world_size)
        assert _whole_steps(where, world_size) == [NEW], change
        CheckpointDirectory(where).collect_garbage()  # of a folder that was half deleted
        assert step_names(where) == ["step-00000002-g00001"], change
        shutil.rmtree(where)
    committing = {(OLD,), (OLD, NEW), (NEW,)}
    assert seen == (committing if rank == 0 else {(OLD,)})


def test_everything_is_durable_before_the_manifest_appears(tmp_path: Path) -> None:
    CheckpointDirectory(tmp_path).create_generation(None, {})
    slot = sealed_slot(NEW)
    with recording(tmp_path) as done:
        flush_slot(slot, _order(tmp_path, 0, 1))
    links = [op.path for op in done.ops if op.kind == "link"]
    published = next(i for i, op in enumerate(done.ops) if op.path.endswith("manifest.json"))
    assert [os.path.basename(path) for path in links] == [
        "00000.json",
        "index.ocdbt",
        "manifest.ocdbt",
        "manifest.json",
    ]
    at_risk = [done.ops[i].path for i in unsynced(done.ops[:published])]
    assert [path for path in at_risk if ".tmp" not in path] == []
    assert unsynced(done.ops) == []


def test_a_full_disk_fails_for_all_and_is_empty_again(small_disk: Path) -> None:
    slots = [sealed_slot(NEW, rank, 2, n_bytes=2 * 2**20) for rank in range(2)]
    root = small_disk / "c"
    CheckpointDirectory(root).create_generation(None, {})
    _flush_all(root, 2, OLD)

    def one(rank: int) -> str:
        with pytest.raises(SaveFailedError) as caught:
            flush_slot(slots[rank], _order(root, rank, 2))
        assert caught.value.causes
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        for text in pool.map(one, range(2)):
            assert "No space left on device (/" in text
    assert not list((root / "step-00000002-g00001").glob("*.safetensors"))
    assert _whole_steps(root, 2) == [OLD]
    _flush_all(root, 2, StepId(1, 3))
    assert _whole_steps(root, 2) == [StepId(1, 3)]
