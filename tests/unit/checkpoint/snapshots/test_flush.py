"""Slots of all ranks become a checkpoint, or none does and all are told why."""

import errno
import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.errors import (
    CheckpointError,
    EverstepError,
    SaveFailedError,
    SlotMemoryError,
)
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.manifest import decode_part, encode_part
from everstep.checkpoint.snapshots import flush
from everstep.checkpoint.snapshots.flush import flush_slot
from everstep.checkpoint.snapshots.memory import Flushed, FlushOrder
from everstep.checkpoint.snapshots.slot_format import part_of, read_seal, unseal
from everstep.checkpoint.step_keys import part_key, step_key
from everstep.checkpoint.stores import open_store
from tests.support.slots import holds, sealed_slot

if TYPE_CHECKING:
    from tests.support.s3_server import S3Server

STEP = StepId(1, 7)
_NUMBERS = itertools.count()


@pytest.fixture(params=["local", "memory"])
def where(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A directory of checkpoints whose first generation has begun, on a disk or elsewhere."""
    monkeypatch.setattr(flush, "REMOTE_POLL_S", 0.02)
    local = request.param == "local"
    url = str(tmp_path / "c") if local else f"memory://flush-{next(_NUMBERS)}"
    CheckpointDirectory(url).create_generation(None, {"dp": 1}, owner="me")
    return url


def _order(where: str, rank: int = 0, world_size: int = 1, **more: Any) -> FlushOrder:
    return FlushOrder(
        **{
            "directory": where,
            "step_id": STEP,
            "rank": rank,
            "world_size": world_size,
            "keep": 2,
            "deadline_s": 20.0,
            **more,
        }
    )


def _flush_all(
    slots: dict[int, ByteArray], where: str, world_size: int, **more: Any
) -> dict[int, Flushed | Exception]:
    def one(rank: int) -> Flushed | Exception:
        try:
            return flush_slot(slots[rank], _order(where, rank, world_size, **more))
        except EverstepError as e:
            return e

    with ThreadPoolExecutor(len(slots)) as pool:
        return dict(zip(slots, pool.map(one, slots), strict=True))


def _slots(world_size: int, step_id: StepId = STEP, **more: Any) -> dict[int, ByteArray]:
    return {
        rank: sealed_slot(step_id, rank, world_size, owner="me", **more)
        for rank in range(world_size)
    }


def _whole(where: str, step_id: StepId = STEP, world_size: int = 1, **more: Any) -> bool:
    directory = CheckpointDirectory(where)
    assert step_id in directory.lineage()
    with directory.reader(step_id) as reader:
        for pack in range(world_size):
            reader.verify(pack)
        return holds(reader, step_id, world_size, **more)


@pytest.mark.parametrize("n_bytes", [1, 4096, 10_001, 3 * 2**20])
def test_a_slot_becomes_a_checkpoint(where: str, n_bytes: int) -> None:
    slot, told = sealed_slot(STEP, owner="me", n_bytes=n_bytes), list[int]()
    done = flush_slot(slot, _order(where), on_bytes=told.append)
    assert _whole(where, n_bytes=n_bytes)
    directory = CheckpointDirectory(where)
    assert done.step_id == STEP
    assert done.path == directory.describe(STEP)
    assert done.size_bytes == directory.manifest(STEP).size_bytes
    assert done.warning is None
    seal = read_seal(slot)
    assert seal is not None
    assert told == sorted(told)
    assert told[-1] == seal.pack_bytes
    assert directory.store.read(part_key(STEP, 0)) == part_of(slot, seal)


def test_large_packs_go_in_pieces(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flush, "CHUNK_BYTES", 8192)
    told = list[int]()
    flush_slot(sealed_slot(STEP, owner="me", n_bytes=50_000), _order(where), on_bytes=told.append)
    assert len(told) > 5
    assert _whole(where, n_bytes=50_000)


def test_all_ranks_succeed_together(where: str) -> None:
    found = _flush_all(_slots(3), where, 3)
    assert all(isinstance(result, Flushed) for result in found.values()), found
    assert _whole(where, world_size=3)


def test_it_may_be_done_again(where: str) -> None:
    slots = _slots(2)
    first, again = _flush_all(slots, where, 2), _flush_all(slots, where, 2)
    for rank in range(2):
        assert isinstance(a := first[rank], Flushed)
        assert isinstance(b := again[rank], Flushed)
        assert (a.path, a.size_bytes) == (b.path, b.size_bytes)
    assert isinstance(_flush_all({1: slots[1]}, where, 2)[1], Flushed)


def test_what_an_earlier_attempt_left_half_written_is_replaced(where: str) -> None:
    slots, store = _slots(2), CheckpointDirectory(where).store
    for rank in range(2):
        with store.writer(f"{step_key(STEP)}/rank-{rank:05d}-aa.safetensors", 100) as out:
            out.append(bytes(100))
            out.finish()
    assert all(isinstance(r, Flushed) for r in _flush_all(slots, where, 2).values())
    assert _whole(where, world_size=2)


def test_who_has_voted_only_waits(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = _slots(2)
    with pytest.raises(CheckpointError, match="cancelled while it waited for other ranks"):
        flush_slot(slots[1], _order(where, 1, 2), cancelled=_after_voting(where, 1))
    told: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(flush_slot, slots[1], _order(where, 1, 2), on_bytes=told.append)
        flush_slot(slots[0], _order(where, 0, 2))
        assert waiting.result(20).step_id == STEP
    assert told == []
    assert _whole(where, world_size=2)


def _after_voting(where: str, rank: int) -> Any:
    store = CheckpointDirectory(where).store
    return lambda: store.size(part_key(STEP, rank)) is not None


def test_older_checkpoints_are_retired(where: str) -> None:
    for step in (1, 2, 3):
        step_id = StepId(1, step)
        flush_slot(sealed_slot(step_id, owner="me"), _order(where, step_id=step_id))
    assert CheckpointDirectory(where).committed() == [StepId(1, 2), StepId(1, 3)]


def test_what_cannot_be_retired_is_a_warning(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "old")

    monkeypatch.setattr(CheckpointDirectory, "retire", refuse)
    done = flush_slot(sealed_slot(STEP, owner="me"), _order(where))
    assert done.warning == (
        "step 7 is saved, but older checkpoints could not be deleted: Permission denied (old)"
    )
    assert _whole(where)


def test_retiring_is_made_up_for(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        step_id = StepId(1, step)
        flush_slot(sealed_slot(step_id, owner="me"), _order(where, step_id=step_id, keep=9))
    flush_slot(sealed_slot(step_id, owner="me"), _order(where, step_id=step_id, keep=1))
    assert CheckpointDirectory(where).committed() == [StepId(1, 3)]


def _packs(where: str) -> list[str]:
    names = CheckpointDirectory(where).store.list(step_key(STEP))
    return [name for name in names if name.endswith(".safetensors")]


def test_a_failure_is_told_to_all(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = flush._Flush._write

    def broken(self: flush._Flush, *args: Any) -> None:
        if self._rank == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "disk")
        real(self, *args)

    monkeypatch.setattr(flush._Flush, "_write", broken)
    begun_s = time.monotonic()
    for error in _flush_all(_slots(3), where, 3).values():
        assert isinstance(error, SaveFailedError)
        assert error.causes == {1: "No space left on device (disk)"}
    assert time.monotonic() - begun_s < 15
    directory = CheckpointDirectory(where)
    assert directory.committed() == []
    assert _packs(where) == []
    monkeypatch.setattr(flush._Flush, "_write", real)
    again = _flush_all(_slots(3), where, 3)  # votes are cast once
    assert all(isinstance(error, SaveFailedError) for error in again.values())
    assert directory.committed() == []


def test_a_failure_that_cannot_be_told_leaves_the_pack(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> None:
        raise OSError(errno.EIO, "away")

    with monkeypatch.context() as broken:
        broken.setattr(CheckpointDirectory, "put_vote", away)
        broken.setattr(CheckpointDirectory, "put_failure", away)
        with pytest.raises(SaveFailedError, match="away"):
            flush_slot(sealed_slot(STEP, owner="me"), _order(where))
    assert len(_packs(where)) == 1  # its vote may have arrived
    flush_slot(sealed_slot(STEP, owner="me"), _order(where))
    assert _whole(where)


def test_ranks_that_are_not_heard_of(where: str) -> None:
    slots = _slots(3)
    del slots[1]
    for error in _flush_all(slots, where, 3, deadline_s=0.3).values():
        assert isinstance(error, SaveFailedError)
        assert list(error.causes) == [1]
        assert "did not say in time" in error.causes[1]
    late = _flush_all({1: sealed_slot(STEP, 1, 3, owner="me")}, where, 3)[1]
    assert isinstance(late, SaveFailedError)
    assert CheckpointDirectory(where).committed() == []
    assert _packs(where) == []


def test_without_rank_0_the_others_commit_what_all_voted_for(where: str) -> None:
    slots = _slots(2)
    with pytest.raises(CheckpointError, match="cancelled while it waited"):
        flush_slot(slots[0], _order(where, 0, 2), cancelled=_after_voting(where, 0))
    assert isinstance(_flush_all({1: slots[1]}, where, 2, deadline_s=0.2)[1], Flushed)
    assert _whole(where, world_size=2)


def test_a_cancelled_flush_fails_for_all(where: str) -> None:
    slots = _slots(2)
    with pytest.raises(SaveFailedError, match="rank 0: its flush was cancelled"):
        flush_slot(slots[0], _order(where, 0, 2), cancelled=lambda: True)
    error = _flush_all({1: slots[1]}, where, 2)[1]
    assert isinstance(error, SaveFailedError)
    assert error.causes == {0: "its flush was cancelled"}
    assert _packs(where) == []


def test_a_limited_rate_is_kept_and_its_pauses_are_short(where: str) -> None:
    slot, told, begun_s = sealed_slot(STEP, owner="me", n_bytes=400_000), [], time.monotonic()
    flush_slot(
        slot,
        _order(where, rate_bytes_per_s=1e6),
        on_bytes=lambda n: told.append((time.monotonic() - begun_s, n)),
    )
    assert all(n <= 1e6 * s + 131_072 for s, n in told), told
    assert len(told) == 4
    assert _whole(where, n_bytes=400_000)


def test_a_long_pause_can_be_cancelled(where: str) -> None:
    begun_s = time.monotonic()
    with pytest.raises(SaveFailedError, match="cancelled"):
        flush_slot(
            sealed_slot(STEP, owner="me"),
            _order(where, rate_bytes_per_s=10.0),
            cancelled=lambda: time.monotonic() > begun_s + 0.3,
        )
    assert time.monotonic() < begun_s + 10


def test_a_step_that_was_deleted_is_not_waited_for(where: str) -> None:
    slots, directory = _slots(2), CheckpointDirectory(where)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(flush_slot, slots[1], _order(where, 1, 2))
        while not _after_voting(where, 1)():
            time.sleep(0.01)
        directory.delete(STEP)
        with pytest.raises(CheckpointError, match="was deleted before its commit was seen"):
            waiting.result(20)


@pytest.mark.parametrize(
    "change", [{"rank": 1, "world_size": 2}, {"step_id": StepId(2, 7)}, {"world_size": 3}]
)
def test_a_slot_with_something_else_is_refused(where: str, change: dict[str, Any]) -> None:
    slot = sealed_slot(STEP, owner="me")
    with pytest.raises(SlotMemoryError, match=r"holds step 7 of generation 1, rank 0 of 1 ranks"):
        flush_slot(slot, replace(_order(where), **change))
    unseal(slot)
    with pytest.raises(SlotMemoryError, match="holds no sealed snapshot"):
        flush_slot(slot, _order(where))
    assert CheckpointDirectory(where).store.list() == ["generations"]


def test_a_rate_of_nothing_is_refused(where: str) -> None:
    with pytest.raises(ValueError, match="more than 0"):
        flush_slot(sealed_slot(STEP, owner="me"), _order(where, rate_bytes_per_s=0.0))


def test_a_slot_that_is_overwritten_meanwhile_is_no_checkpoint(where: str) -> None:
    slot = sealed_slot(STEP, owner="me")
    with pytest.raises(SaveFailedError, match="overwritten while it was flushed"):
        flush_slot(slot, _order(where), on_bytes=lambda _: unseal(slot))
    assert CheckpointDirectory(where).committed() == []


def test_the_directory_of_another_run_is_left_alone(where: str) -> None:
    with pytest.raises(CheckpointError, match="belongs to another run"):
        flush_slot(sealed_slot(STEP, owner="somebody"), _order(where))
    assert CheckpointDirectory(where).store.list() == ["generations"]


def test_a_directory_that_was_lost_to_another_job_gets_nothing_more() -> None:
    url = f"memory://flush-{next(_NUMBERS)}"
    directory, slot = CheckpointDirectory(url), sealed_slot(STEP, owner="me")
    directory.create_generation(None, {}, owner="me")
    flush_slot(slot, _order(url))
    directory.create_generation(STEP, {}, owner="another")
    late = StepId(1, 8)
    with pytest.raises(SaveFailedError, match="another has begun generation 2"):
        flush_slot(sealed_slot(late, owner="me"), _order(url, step_id=late))
    assert directory.committed() == [STEP]
    again = flush_slot(slot, _order(url))
    assert again.step_id == STEP
    assert again.warning is not None
    assert "older checkpoints could not be deleted" in again.warning


def test_the_vote_of_another_attempt_is_not_taken_for_the_own(where: str) -> None:
    slot = sealed_slot(STEP, owner="me")
    seal = read_seal(slot)
    assert seal is not None
    part = decode_part(part_of(slot, seal), "slot")
    other = encode_part(replace(part, context={**part.context, "seed": 1}))
    CheckpointDirectory(where).put_vote(STEP, 0, other)
    with pytest.raises(SaveFailedError, match="the vote of another attempt"):
        flush_slot(slot, _order(where))
    assert CheckpointDirectory(where).committed() == []


def test_a_store_that_is_away_for_a_while_is_waited_for(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flush, "RETRY_S", 0.05)
    slot, real, left = sealed_slot(STEP, owner="me"), CheckpointDirectory.commit, iter(range(3))

    def commit(self: CheckpointDirectory, *args: Any) -> Any:
        if next(left, None) is not None:
            raise OSError(errno.EIO, "away")
        return real(self, *args)

    monkeypatch.setattr(CheckpointDirectory, "commit", commit)
    assert flush_slot(slot, _order(where)).step_id == STEP
    assert _whole(where)


def test_an_object_store_is_flushed_to(s3: "S3Server", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flush, "REMOTE_POLL_S", 0.1)
    url = s3.new_url()
    directory = CheckpointDirectory(open_store(url, storage_options=s3.options))
    directory.create_generation(None, {}, owner="me")
    for _ in range(2):
        found = _flush_all(_slots(2), url, 2, storage_options=s3.options)
        assert all(isinstance(result, Flushed) for result in found.values()), found
    with directory.reader(STEP) as reader:
        assert holds(reader, STEP, 2)


def test_a_store_that_stays_away_is_not_waited_for_for_ever(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> None:
        raise OSError(errno.EIO, "away")

    monkeypatch.setattr(CheckpointDirectory, "commit", away)
    with pytest.raises(OSError, match="away"):
        flush_slot(sealed_slot(STEP, owner="me"), _order(where, deadline_s=0.2))
    monkeypatch.undo()
    assert flush_slot(sealed_slot(STEP, owner="me"), _order(where)).step_id == STEP
    assert _whole(where)


def test_slots_are_written_without_another_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot, real, addresses = sealed_slot(STEP, n_bytes=100_000), os.write, list[int]()

    def written(fd: int, data: Any) -> int:
        view = np.frombuffer(data, np.uint8)
        if len(view) >= 4096:
            addresses.append(view.ctypes.data - slot.ctypes.data)
        return real(fd, data)

    monkeypatch.setattr(os, "write", written)
    flush_slot(slot, _order(str(tmp_path / "c")))
    seal = read_seal(slot)
    assert seal is not None
    assert seal.pack_start in addresses
    assert sum(0 <= a < len(slot) for a in addresses) == 1
