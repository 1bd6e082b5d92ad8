"""Keepers, their supervisors and their clients are killed: what was sealed is there afterwards."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from everstep.checkpoint.keeper import control
from everstep.checkpoint.keeper.client import KeeperMemory
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.snapshots.slot_format import read_seal
from tests.support.keepers import (
    PROGRAM,
    SLOT_BYTES,
    eventually,
    flushed,
    holds,
    inodes_of,
    order,
    processes_of,
    result,
    seal,
    users_of,
)

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(60)]
JOB = "job"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Whatever was started there does not run on."""
    folder = tmp_path / "place"
    yield folder
    while left := list(processes_of(folder)):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def start(place: Path, linger_s: float = 60.0) -> None:
    assert control.start(
        JOB, place=place, budget_bytes=2**28, linger_s=linger_s, module=PROGRAM, timeout_s=30
    )


def connect(place: Path) -> KeeperMemory:
    return KeeperMemory(JOB, rank=0, world_size=1, place=place, timeout_s=30)


def keeper_of(place: Path) -> int:
    found = control.status(JOB, place=place, timeout_s=30)
    assert found is not None
    return int(found["pid"])


def supervisor_of(place: Path) -> int:
    (found,) = set(processes_of(place)) - {keeper_of(place)}
    return found


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not _lives(pid))


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_nothing_left(place: Path, inodes: set[int]) -> None:
    eventually(lambda: not list(processes_of(place)))
    assert not users_of(inodes) - {os.getpid()}
    assert sorted(p.name for p in (place / JOB).iterdir()) == ["keeper.log", "lock"]


def test_keepers_and_supervisors_are_killed_under_a_client(place: Path, tmp_path: Path) -> None:
    start(place)
    assert not control.start(JOB, place=place, module=PROGRAM)
    memory = connect(place)
    slots = memory.reserve(SLOT_BYTES, 2)
    inodes = inodes_of(memory)
    seal(slots[0], 3)

    (tmp_path / "hold").touch()
    future = memory.flush(0, order(tmp_path, 3))
    eventually((tmp_path / "tries").exists)
    first = keeper_of(place)
    kill(first)
    (tmp_path / "hold").unlink()
    assert result(future).step_id == StepId(1, 3)
    assert keeper_of(place) != first
    assert holds(memory.reserve(SLOT_BYTES, 2)[0], 3)

    second = keeper_of(place)
    kill(supervisor_of(place))
    eventually(lambda: len(list(processes_of(place))) == 2)
    assert keeper_of(place) == second
    seal(slots[1], 4)
    kill(second)  # the new supervisor holds what the old one held
    assert [s["step"] for s in memory.status()["slots"]] == [3, 4]

    both = set(processes_of(place))
    for pid in (supervisor_of(place), keeper_of(place)):
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not any(map(_lives, both)) or set(processes_of(place)) - both)
    eventually(lambda: len(list(processes_of(place))) in (0, 2))
    control.start(JOB, place=place, budget_bytes=2**28, module=PROGRAM)
    assert [s["step"] for s in memory.status()["slots"]] == [3, 4]
    assert memory.reserve(SLOT_BYTES, 2)[0] is slots[0]
    held = memory.holdings()
    assert all(holds(h.memory, h.seal.step_id.step) for h in held)
    for each in held:
        each.release()

    memory.close()
    del slots, held, each
    assert control.stop(JOB, place=place, timeout_s=30)
    assert not control.stop(JOB, place=place)
    assert_nothing_left(place, inodes)


def trainer(place: Path, orphans: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.support.keeper_trainer", place, "0", "1", orphans]
    return subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def newest(memory: KeeperMemory) -> int:
    """The newest step in memory, every one of which is whole."""
    steps = []
    for slot in memory.reserve(SLOT_BYTES, 3):
        found = read_seal(slot)
        if found is not None:
            assert holds(slot, found.step_id.step)
            steps.append(found.step_id.step)
    return max(steps, default=-1)


def test_a_trainer_is_killed_and_its_keeper_while_it_saves(place: Path, tmp_path: Path) -> None:
    start(place)
    (tmp_path / "hold").touch()
    process = trainer(place, tmp_path)
    assert process.stdout is not None
    with process:
        said = [int(process.stdout.readline()) for _ in range(20)]
        process.kill()
        said += map(int, process.stdout.read().split())
    eventually((tmp_path / "tries").exists)
    kill(keeper_of(place))  # while it makes durable what the trainer has left
    (tmp_path / "hold").unlink()
    with contextlib.closing(connect(place)) as memory:
        last = newest(memory)
        inodes = inodes_of(memory)
        assert last >= said[-1]
        eventually(lambda: not memory.flushing())
        memory.set_orphan_order(order(tmp_path, 0))
        memory.close(finished=False)
    eventually(lambda: f"{last}-0" in flushed(tmp_path))
    os.kill(supervisor_of(place), signal.SIGTERM)
    assert_nothing_left(place, inodes)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(3))
def test_random_kills(place: Path, tmp_path: Path, seed: int) -> None:
    """Of trainer, keeper and supervisor, one or several at once, never of all at once."""
    random_ = random.Random(seed)
    start(place)
    reached = -1
    for _ in range(20):
        process = trainer(place, tmp_path)
        assert process.stdout is not None
        with process:
            said = [int(process.stdout.readline()) for _ in range(random_.randrange(1, 200))]
            if random_.random() < 0.7:
                victim = keeper_of(place) if random_.random() < 0.6 else supervisor_of(place)
                os.kill(victim, signal.SIGKILL)
                time.sleep(random_.random() * 0.5)
                said.append(int(process.stdout.readline()))
            process.kill()
            said += map(int, process.stdout.read().split())
        assert said[0] > reached, "a step was captured again that was sealed already"
        eventually(lambda: len(list(processes_of(place))) == 2)
        memory = connect(place)
        reached = newest(memory)
        inodes = inodes_of(memory)
        assert reached >= said[-1]
        memory.close(finished=False)
    control.stop(JOB, place=place, timeout_s=60)
    assert f"{reached}-0" in flushed(tmp_path)
    assert_nothing_left(place, inodes)
