"""A keeper and its clients, in one process."""

import contextlib
import fcntl
import mmap
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.errors import KeeperError, SaveFailedError, SlotMemoryError
from everstep.checkpoint.keeper import control
from everstep.checkpoint.keeper.client import KeeperMemory
from everstep.checkpoint.keeper.place import KeeperPlace
from everstep.checkpoint.keeper.server import ReadSlot, SealedSlots
from everstep.checkpoint.keeper.wire import Channel
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.snapshots.memory import SlotMemory
from tests.support.keepers import (
    SLOT_BYTES,
    KeeperThread,
    eventually,
    flushed,
    holds,
    inodes_of,
    order,
    result,
    seal,
    users_of,
)


@pytest.fixture
def place(tmp_path: Path) -> KeeperPlace:
    return KeeperPlace.of("job", tmp_path / "place")


@pytest.fixture
def keeper(place: KeeperPlace) -> Iterator[KeeperThread]:
    with KeeperThread(place) as started:
        yield started


def test_what_is_sealed_outlives_its_client(keeper: KeeperThread) -> None:
    first: SlotMemory = keeper.connect()
    slots = first.reserve(SLOT_BYTES, 2)
    assert [len(slot) for slot in slots] == [SLOT_BYTES, SLOT_BYTES]
    seal(slots[1], 7)
    first.sealed(1, None)
    first.close(finished=False)
    with keeper.connect() as second:
        slots = second.reserve(SLOT_BYTES, 2)
        assert holds(slots[1], 7)
        assert not holds(slots[0], 7)
        assert second.reserve(SLOT_BYTES, 2)[1] is slots[1]


def test_a_finished_rank_leaves_nothing(keeper: KeeperThread) -> None:
    memory = keeper.connect()
    slots = memory.reserve(SLOT_BYTES, 2)
    inodes = inodes_of(memory)
    assert users_of(inodes) == {os.getpid()}
    memory.close()
    memory.close()
    del slots
    with keeper.connect() as other:
        assert other.status()["memory_bytes"] == 0
    assert not users_of(inodes)


def test_other_numbers_keep_the_old_slots_until_they_are_freed(keeper: KeeperThread) -> None:
    with keeper.connect() as memory:
        old = memory.reserve(SLOT_BYTES, 2)
        seal(old[0], 3)
        memory.reserve(2 * SLOT_BYTES, 3)
        assert memory.status()["memory_bytes"] == 8 * SLOT_BYTES
        (held,) = memory.holdings()
        memory.free_others()
        assert memory.status()["memory_bytes"] == 8 * SLOT_BYTES, "it is still read"
        assert holds(held.memory, 3)
        held.release()
        held.release()
        eventually(lambda: memory.status()["memory_bytes"] == 6 * SLOT_BYTES)


def test_the_budget_is_kept(place: KeeperPlace) -> None:
    with KeeperThread(place, budget_bytes=5 * SLOT_BYTES) as keeper, keeper.connect(0, 2) as memory:
        memory.reserve(SLOT_BYTES, 3)
        with keeper.connect(1, 2) as other:
            with pytest.raises(SlotMemoryError) as refused:
                other.reserve(SLOT_BYTES, 3)
            assert f"{3 * SLOT_BYTES} bytes together" in str(refused.value)
            assert f"{2 * SLOT_BYTES} left of its budget of {5 * SLOT_BYTES}" in str(refused.value)
            assert "--memory-budget" in str(refused.value)
            other.reserve(SLOT_BYTES, 2)


@pytest.mark.parametrize(("slot_bytes", "slots"), [(100, 1), (SLOT_BYTES, 0), (SLOT_BYTES, 65)])
def test_numbers_that_are_none_of_slots(keeper: KeeperThread, slot_bytes: int, slots: int) -> None:
    with keeper.connect() as memory:
        with pytest.raises(KeeperError, match="cannot do 'reserve'"):
            memory.reserve(slot_bytes, slots)
        memory.reserve(SLOT_BYTES, 1)


def test_holdings_are_of_all_ranks_and_cannot_be_written(keeper: KeeperThread) -> None:
    with keeper.connect(0, 2) as zero, keeper.connect(1, 2) as one:
        for rank, memory in enumerate((zero, one)):
            seal(memory.reserve(SLOT_BYTES, 2)[0], 5, rank=rank, world_size=2)
        held = {h.seal.rank: h for h in zero.holdings()}
        assert sorted(held) == [0, 1]
        assert held[1].part == b'{"step": 5, "rank": 1}'
        assert holds(held[1].memory, 5, rank=1)
        with pytest.raises(ValueError, match="read-only"):
            held[1].memory[0] = 1
        reply = one._link.call("holdings", known=[])
        try:
            with pytest.raises(PermissionError):
                mmap.mmap(reply.fds[0], SLOT_BYTES)
        finally:
            for fd in reply.fds:
                os.close(fd)


def test_a_damaged_slot_is_not_sealed(keeper: KeeperThread) -> None:
    with keeper.connect() as memory:
        slots = memory.reserve(SLOT_BYTES, 2)
        for slot, byte in zip(slots, (20, 4100), strict=True):
            seal(slot, 4)
            slot[byte] ^= 1  # in the seal; in the part
            memory.sealed(0, None)
        assert memory.holdings() == []
        assert [s["sealed"] for s in memory.status()["slots"]] == [False, False]


def test_a_flush_resolves_when_it_is_durable(keeper: KeeperThread, tmp_path: Path) -> None:
    with keeper.connect() as memory:
        seal(memory.reserve(SLOT_BYTES, 2)[1], 8)
        (tmp_path / "hold").touch()
        first = memory.flush(1, order(tmp_path, 8))
        again = memory.flush(1, order(tmp_path, 8))
        eventually(lambda: memory.flushing() == {StepId(1, 8)})
        assert memory.pinned() == {1}
        assert memory.status()["flushes"]["running"][0]["step"] == 8
        (tmp_path / "hold").unlink()
        assert result(first).step_id == result(again).step_id == StepId(1, 8)
        assert result(memory.flush(1, order(tmp_path, 8))).path == str(tmp_path / "8-0")
        assert memory.flushing() == set()
        assert memory.pinned() == set()
        assert (tmp_path / "tries").read_text() == "8-0\n"
        assert memory.status()["flushes"]["done"] == 2


def test_a_flush_fails_with_its_own_error(keeper: KeeperThread, tmp_path: Path) -> None:
    with keeper.connect() as memory:
        slots = memory.reserve(SLOT_BYTES, 1)
        with pytest.raises(SlotMemoryError, match="does not hold step 8"):
            result(memory.flush(0, order(tmp_path, 8)))
        seal(slots[0], 9)
        with pytest.raises(SlotMemoryError, match="does not hold step 8"):
            result(memory.flush(0, order(tmp_path, 8)))
        (tmp_path / "fail").touch()
        with pytest.raises(SaveFailedError) as failed:
            result(memory.flush(0, order(tmp_path, 9)))
        assert failed.value.causes == {0: "No space left on device"}
        with pytest.raises(FileNotFoundError) as missing:
            result(memory.flush(0, order(tmp_path / "nowhere", 9)))
        assert missing.value.filename == str(tmp_path / "nowhere" / "tries")
        (tmp_path / "fail").unlink()
        result(memory.flush(0, order(tmp_path, 9)))
        with pytest.raises(KeeperError, match="there is no slot 1 of rank 0"):
            result(memory.flush(1, order(tmp_path, 9)))


def test_closing_waits_for_flushes(keeper: KeeperThread, tmp_path: Path) -> None:
    memory = keeper.connect()
    seal(memory.reserve(SLOT_BYTES, 1)[0], 1)
    future = memory.flush(0, order(tmp_path, 1))
    memory.close()
    assert future.done()
    assert flushed(tmp_path) == ["1-0"]


def test_orphans_are_made_durable(keeper: KeeperThread, tmp_path: Path) -> None:
    memories = [keeper.connect(rank, 2) for rank in (0, 1)]
    for rank, memory in enumerate(memories):
        slots = memory.reserve(SLOT_BYTES, 3)
        for index, step in enumerate((4, 5, 6)):
            if (rank, step) != (1, 6):  # which is whole nowhere
                seal(slots[index], step, rank=rank, world_size=2)
        memory.set_orphan_order(order(tmp_path, 0, rank=rank, world_size=2))
    memories[0].close(finished=False)
    with pytest.raises(AssertionError):
        eventually(lambda: flushed(tmp_path), timeout_s=0.2)
    memories[1].close(finished=False)
    eventually(lambda: flushed(tmp_path) == ["5-0", "5-1"])


def test_a_restarted_trainer_takes_over_while_its_orphans_are_flushed(
    keeper: KeeperThread, tmp_path: Path
) -> None:
    memory = keeper.connect()
    seal(memory.reserve(SLOT_BYTES, 2)[0], 4)
    memory.set_orphan_order(order(tmp_path, 0))
    (tmp_path / "hold").touch()
    memory.close(finished=False)
    eventually(lambda: (tmp_path / "tries").exists())
    with keeper.connect() as restarted:
        assert restarted.flushing() == {StepId(1, 4)}
        assert holds(restarted.reserve(SLOT_BYTES, 2)[0], 4)
        assert restarted.pinned() == {0}
        (tmp_path / "hold").unlink()
        eventually(lambda: not restarted.flushing())
    assert flushed(tmp_path) == ["4-0"]


def _is_locked(path: Path) -> bool:
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_lent_lock_is_held_until_nothing_is_written(keeper: KeeperThread, tmp_path: Path) -> None:
    memory, lock = keeper.connect(), tmp_path / "lock"
    seal(memory.reserve(SLOT_BYTES, 2)[0], 4)
    memory.set_orphan_order(order(tmp_path, 0))
    assert memory.borrowed_lock(str(tmp_path)) is None
    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        memory.lend_lock(str(tmp_path), file.fileno())
        memory.lend_lock(str(tmp_path), file.fileno())
    assert _is_locked(lock)
    (tmp_path / "hold").touch()
    memory.close(finished=False)
    with keeper.connect() as restarted:
        borrowed = restarted.borrowed_lock(str(tmp_path))
        assert borrowed is not None
        assert os.path.samestat(os.fstat(borrowed), os.stat(lock))
        assert _is_locked(lock)
        (tmp_path / "hold").unlink()
        os.close(borrowed)
        restarted.close(finished=False)
    eventually(lambda: not _is_locked(lock))


def test_a_finished_rank_gives_its_lock_back(keeper: KeeperThread, tmp_path: Path) -> None:
    with keeper.connect() as memory, open(tmp_path / "lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        memory.lend_lock(str(tmp_path), file.fileno())
    assert not _is_locked(tmp_path / "lock")


def test_the_next_process_of_a_rank_takes_its_place(keeper: KeeperThread) -> None:
    first = keeper.connect()
    seal(first.reserve(SLOT_BYTES, 1)[0], 2)
    with keeper.connect() as second:
        assert holds(second.reserve(SLOT_BYTES, 1)[0], 2)
        with pytest.raises(KeeperError, match="has taken the place of this rank"):
            first.status()
        first.close()
        assert second.status()["trainers"] == [{"rank": 0, "pid": os.getpid()}]


def test_what_lost_ranks_have_is_freed_when_all_have_newer(keeper: KeeperThread) -> None:
    with keeper.connect(0, 2) as zero:
        with contextlib.closing(keeper.connect(1, 2)) as one:
            seal(one.reserve(SLOT_BYTES, 1)[0], 5, rank=1, world_size=2)
            one.close(finished=False)
        seal(zero.reserve(SLOT_BYTES, 1)[0], 5, world_size=2)
        for all_sealed, slots in ((None, 2), (StepId(1, 5), 2), (StepId(1, 6), 1)):
            zero.sealed(0, all_sealed)
            zero.free_others()
            assert len(zero.status()["slots"]) == slots


def test_it_ends_when_nobody_is_there_for_long(place: KeeperPlace, tmp_path: Path) -> None:
    with KeeperThread(place, linger_s=0.3) as keeper:
        memory = keeper.connect()
        seal(memory.reserve(SLOT_BYTES, 1)[0], 4)
        memory.set_orphan_order(order(tmp_path, 0))
        inodes = inodes_of(memory)
        memory.close(finished=False)
        keeper.wait()
    assert flushed(tmp_path) == ["4-0"]
    assert not users_of(inodes)


def test_a_signal_makes_it_save_and_end_when_trainers_have(
    keeper: KeeperThread, tmp_path: Path
) -> None:
    memory = keeper.connect()
    seal(memory.reserve(SLOT_BYTES, 1)[0], 4)
    memory.set_orphan_order(order(tmp_path, 0))
    keeper.keeper.terminate()
    eventually(lambda: flushed(tmp_path) == ["4-0"])
    seal(memory.reserve(SLOT_BYTES, 1)[0], 5)
    result(memory.flush(0, order(tmp_path, 5)))
    memory.close()
    keeper.wait()


def test_a_client_goes_on_with_the_next_keeper(place: KeeperPlace, tmp_path: Path) -> None:
    with KeeperThread(place) as first:
        memory = first.connect(timeout_s=20)
        slots = memory.reserve(SLOT_BYTES, 2)
        seal(slots[0], 6)
        memory.set_orphan_order(order(tmp_path, 0))
        (held,) = memory.holdings()
        (tmp_path / "hold").touch()
        future = memory.flush(0, order(tmp_path, 6))
        eventually((tmp_path / "tries").exists)
    (tmp_path / "hold").unlink()
    with KeeperThread(place):
        assert memory.reserve(SLOT_BYTES, 2)[0] is slots[0]
        assert result(future).step_id == StepId(1, 6)
        assert [s["step"] for s in memory.status()["slots"]] == [6, None]
        assert memory.pinned() == {0}
        held.release()
        assert memory.pinned() == set()
        memory.close()


def test_without_a_keeper_calls_fail_in_time(place: KeeperPlace, tmp_path: Path) -> None:
    with KeeperThread(place) as keeper:
        memory = keeper.connect(timeout_s=0.3)
        seal(memory.reserve(SLOT_BYTES, 1)[0], 6)
        (tmp_path / "hold").touch()
        future = memory.flush(0, order(tmp_path, 6))
        eventually((tmp_path / "tries").exists)
    place.clear()
    with pytest.raises(KeeperError, match="everstep keeper start --job job"):
        result(future)
    with pytest.raises(KeeperError, match="everstep keeper start --job job"):
        memory.pinned()
    memory.sealed(0, None)
    memory.close()
    with pytest.raises(KeeperError, match="is closed"):
        memory.pinned()
    with pytest.raises(KeeperError, match=r"is not there: .*everstep keeper start --job job"):
        KeeperMemory("job", rank=0, world_size=1, place=place.root)


def test_it_shows_what_trainers_tell(keeper: KeeperThread) -> None:
    with keeper.connect(1, 2) as memory:
        memory.tell({"snapshots": 12, "stall_s": 0.5})
        found = memory.status()
    assert found["counters"] == {"1": {"snapshots": 12, "stall_s": 0.5}}
    assert found["job"] == "job"
    assert found["trainers"] == [{"rank": 1, "pid": os.getpid()}]


def test_bad_requests_are_refused_and_cost_nothing(keeper: KeeperThread) -> None:
    with keeper.connect() as memory:
        for do in ("nonsense", "flush", "sealed", "adopt", "lend_lock", "pin_again", "goodbye"):
            with pytest.raises(KeeperError):
                memory._link.call(do)
        shape: dict[str, Any] = {"set_id": "x", "rank": 0, "slot_bytes": 4096, "slots": 1}
        with open(os.devnull) as file, pytest.raises(KeeperError, match="no memfd"):
            memory._link.call("adopt", [file.fileno()], **shape)
        connection = keeper.place.connect()
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert connection.recv(1) == b""
        connection.close()
        stranger = Channel(keeper.place.connect())
        stranger.send({"id": 1, "do": "reserve", "slot_bytes": 4096, "slots": 1})
        (frame,) = stranger.receive()
        assert "only a rank" in frame.body["error"]["text"]
        stranger.send({"id": 2, "do": "hello", "rank": 3, "world_size": 2})
        (frame,) = stranger.receive()
        assert "3 is no rank of 2 ranks" in frame.body["error"]["text"]
        stranger.close()
        memory.reserve(SLOT_BYTES, 1)


def _ask_for_ever(channel: Channel) -> None:
    while True:
        channel.send({"id": 1, "do": "status"})


def test_a_client_that_does_not_read_is_dropped(keeper: KeeperThread) -> None:
    lazy = Channel(keeper.place.connect())
    with keeper.connect() as memory:
        memory.reserve(SLOT_BYTES, 64)
        with pytest.raises(OSError):
            _ask_for_ever(lazy)
        assert memory.pinned() == set()
    lazy.close()


_STRANGER = """
import os, socket, sys
os.setgroups([])
os.setuid(65534)
s = socket.socket(socket.AF_UNIX)
try:
    s.connect(sys.argv[1])
    print(s.recv(100))
except OSError as error:
    print(type(error).__name__)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_gets_nothing(keeper: KeeperThread, tmp_path: Path) -> None:
    address = keeper.place.path / "keeper.sock"

    def stranger() -> str:
        command = [sys.executable, "-I", "-c", _STRANGER, str(address)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()

    assert stranger() == "PermissionError"
    folders = [keeper.place.path, *keeper.place.path.parents]
    modes = {folder: folder.stat().st_mode for folder in folders[:-1]}
    try:
        for folder in modes:
            folder.chmod(0o777)
        address.chmod(0o777)
        assert stranger() in ("b''", "ConnectionResetError")
        with pytest.raises(KeeperError, match="can be entered by others"):
            keeper.connect()
    finally:
        for folder, mode in modes.items():
            folder.chmod(mode & 0o7777)
    assert any("of user 65534 was turned away" in line for line in keeper.lines)


def test_a_data_plane_reads_what_is_sealed(place: KeeperPlace) -> None:
    made: list[tuple[ReadSlot, SealedSlots, bytes, str | None]] = []

    class Plane:
        address = "192.0.2.1:7"
        closed = False

        def close(self) -> None:
            self.closed = True

    plane = Plane()

    def factory(read: ReadSlot, slots: SealedSlots, token: bytes, interface: str | None) -> Plane:
        made.append((read, slots, token, interface))
        return plane

    with KeeperThread(place, data_plane_factory=factory) as keeper, keeper.connect() as memory:
        assert memory.address() == plane.address
        seal(memory.reserve(SLOT_BYTES, 2)[1], 3)
        ((read, slots, token, _),) = made
        assert token == memory.token()
        assert slots() == [(0, StepId(1, 3))]
        with read(0, StepId(1, 3)) as found:
            assert holds(found, 3)
            assert memory.pinned() == {1}
        eventually(lambda: not memory.pinned())
        with (
            pytest.raises(KeeperError, match="is not in this keeper's memory"),
            read(1, StepId(1, 3)),
        ):
            pass
    assert plane.closed


def test_a_forked_child_lets_go(keeper: KeeperThread, tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from everstep.checkpoint.keeper.client import KeeperMemory
memory = KeeperMemory("job", rank=0, world_size=1, place=Path(sys.argv[1]))
memory.reserve(65536, 1)
lock = os.open("/dev/null", os.O_RDONLY)
memory.lend_lock("x", lock)
mine = [memory._link._channel.fileno(), *memory._sets[0].fds, *memory._locks.values()]
child = os.fork()
if child == 0:
    os._exit(sum(os.path.exists(f"/proc/self/fd/{fd}") for fd in mine))
print(len(mine), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), memory.pinned())
memory.close()
"""
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(keeper.place.root)],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert found.stdout == "3 0 set()\n"


def test_a_trainer_is_killed_before_its_keeper() -> None:
    code = """
from everstep.checkpoint.keeper.client import prefer_dying
print(prefer_dying(300), prefer_dying(200), open("/proc/self/oom_score_adj").read())
"""
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    out = subprocess.check_output(command, env=environment, timeout=30, text=True)
    first, second, now = map(int, out.split())
    assert first == second == now >= 300


def test_arrays_outlive_the_memory(keeper: KeeperThread) -> None:
    memory = keeper.connect()
    slot: ByteArray = memory.reserve(SLOT_BYTES, 1)[0]
    memory.close()
    slot[:] = np.uint8(3)
    assert int(slot[-1]) == 3


def test_status_in_a_process_with_many_files(keeper: KeeperThread, place: KeeperPlace) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip(f"this host lets a process have {hard} files only")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    with contextlib.ExitStack() as files:
        for _ in range(1100):
            files.enter_context(open(os.devnull))
        found = control.status(place.job, place=place.root)
    assert found is not None
    assert found["pid"] == os.getpid()


def test_trainers_vanish_again_while_the_first_rescue_lasts(
    keeper: KeeperThread, tmp_path: Path
) -> None:
    (tmp_path / "hold").touch()
    tries = tmp_path / "tries"
    tries.touch()
    for step in (3, 4):
        memory = keeper.connect()
        seal(memory.reserve(SLOT_BYTES, 2)[step % 2], step)
        memory.set_orphan_order(order(tmp_path, 0))
        memory.close(finished=False)
        eventually(lambda step=step: f"{step}-0" in tries.read_text())  # type: ignore[misc]
    (tmp_path / "hold").unlink()
    eventually(lambda: flushed(tmp_path) == ["3-0", "4-0"])
