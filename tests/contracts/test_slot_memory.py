"""The contract of SlotMemory, for every implementation there is."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.errors import CheckpointError, SaveFailedError, SlotMemoryError
from everstep.checkpoint.keeper.client import KeeperMemory
from everstep.checkpoint.keeper.place import KeeperPlace
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.snapshots.arena import ArenaMemory
from everstep.checkpoint.snapshots.flush import flush_slot
from everstep.checkpoint.snapshots.memory import FlushOrder, SlotMemory
from everstep.checkpoint.snapshots.slot_format import PAGE_BYTES, read_seal
from tests.support.keepers import KeeperThread
from tests.support.slots import holds, sealed_slot


class _Kept(KeeperMemory):
    """With a keeper of its own, in a thread of this process."""

    def __init__(self, folder: Path) -> None:
        self._keeper = KeeperThread(KeeperPlace.of("job", folder), flush=flush_slot)
        super().__init__("job", rank=0, world_size=1, place=folder, timeout_s=20)

    def close(self, *, finished: bool = True) -> None:
        super().close(finished=finished)
        self._keeper.end()


IMPLEMENTATIONS: dict[str, Callable[[Path], SlotMemory]] = {
    "arena": lambda _: ArenaMemory(),
    "keeper": _Kept,
}
"""Each makes the memory of rank 0 of one, in a folder of its own."""

SLOT_BYTES = 64 * PAGE_BYTES
STEP = StepId(1, 7)


@pytest.fixture(params=IMPLEMENTATIONS)
def memory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SlotMemory]:
    made = IMPLEMENTATIONS[request.param](tmp_path / "memory")
    yield made
    made.close()


def _order(root: Path, **more: Any) -> FlushOrder:
    return FlushOrder(
        **{
            "directory": str(root),
            "step_id": STEP,
            "rank": 0,
            "world_size": 1,
            "keep": 3,
            "deadline_s": 20.0,
            **more,
        }
    )


def _whole(root: Path, step_id: StepId = STEP) -> bool:
    directory = CheckpointDirectory(root)
    with directory.reader(step_id) as reader:
        return holds(reader, step_id)


def test_slots_are_aligned_zero_and_writable(memory: SlotMemory) -> None:
    slots = memory.reserve(SLOT_BYTES, 3)
    assert [len(slot) for slot in slots] == [SLOT_BYTES] * 3
    for number, slot in enumerate(slots):
        assert slot.ctypes.data % PAGE_BYTES == 0
        assert not slot.any()
        slot[:] = number + 1
    assert [int(slot[-1]) for slot in slots] == [1, 2, 3]


def test_the_same_numbers_give_the_same_slots(memory: SlotMemory) -> None:
    first = memory.reserve(SLOT_BYTES, 2)
    first[1][:] = 5
    again = memory.reserve(SLOT_BYTES, 2)
    assert not again[0].any()
    assert (again[1] == 5).all()
    again[0][:] = 6
    assert (first[0] == 6).all()


def test_other_numbers_give_other_slots_and_the_old_ones_stay(memory: SlotMemory) -> None:
    old = memory.reserve(SLOT_BYTES, 2)
    for slot in old:
        slot[:] = 9
    new = memory.reserve(2 * SLOT_BYTES, 3)
    assert [len(slot) for slot in new] == [2 * SLOT_BYTES] * 3
    for slot in new:
        assert not slot.any()
        slot[:] = 1
    assert all((slot == 9).all() for slot in old)
    memory.free_others()
    assert all((slot == 1).all() for slot in memory.reserve(2 * SLOT_BYTES, 3))


def test_what_was_freed_is_not_there_again(memory: SlotMemory) -> None:
    memory.reserve(SLOT_BYTES, 1)[0][:] = 9
    memory.reserve(SLOT_BYTES, 2)
    memory.free_others()
    assert not memory.reserve(SLOT_BYTES, 1)[0].any()


def test_a_slot_is_flushed(memory: SlotMemory, tmp_path: Path) -> None:
    slots = memory.reserve(SLOT_BYTES, 2)
    sealed_slot(STEP, slot=slots[1])
    memory.sealed(1, None)
    done = memory.flush(1, _order(tmp_path / "c")).result(20)
    assert done.step_id == STEP
    assert done.path == str(tmp_path / "c" / "step-00000007-g00001")
    assert _whole(tmp_path / "c")
    assert read_seal(slots[1]) is not None


def test_flushes_may_follow_each_other(memory: SlotMemory, tmp_path: Path) -> None:
    slots, ids = memory.reserve(SLOT_BYTES, 3), [StepId(1, step) for step in (1, 2, 3)]
    for index, (slot, step_id) in enumerate(zip(slots, ids, strict=True)):
        sealed_slot(step_id, slot=slot)
        memory.sealed(index, ids[index - 1] if index else None)
    futures = [
        memory.flush(index, _order(tmp_path / "c", step_id=step_id))
        for index, step_id in enumerate(ids)
    ]
    assert [future.result(20).step_id for future in futures] == ids
    assert all(_whole(tmp_path / "c", step_id) for step_id in ids)


def test_a_flush_that_fails_says_why(memory: SlotMemory, tmp_path: Path) -> None:
    (tmp_path / "c").write_text("not a folder")
    slots = memory.reserve(SLOT_BYTES, 1)
    with pytest.raises(SlotMemoryError, match="holds no sealed snapshot"):
        memory.flush(0, _order(tmp_path / "c")).result(20)
    sealed_slot(STEP, slot=slots[0])
    memory.sealed(0, None)
    with pytest.raises(SaveFailedError) as caught:
        memory.flush(0, _order(tmp_path / "c")).result(20)
    assert list(caught.value.causes) == [0]
    sealed_slot(STEP, 0, 2, slot=slots[0])
    with pytest.raises(SaveFailedError, match="rank 1: it did not say in time"):
        memory.flush(0, _order(tmp_path / "d", world_size=2, deadline_s=0.2)).result(20)


def test_there_is_no_slot_that_was_not_reserved(memory: SlotMemory, tmp_path: Path) -> None:
    memory.reserve(SLOT_BYTES, 2)
    with pytest.raises(CheckpointError, match="there is no slot 2"):
        memory.flush(2, _order(tmp_path / "c")).result(20)


def test_more_memory_than_there_is(memory: SlotMemory) -> None:
    with pytest.raises(SlotMemoryError):
        memory.reserve(2**50, 2)
    slots = memory.reserve(SLOT_BYTES, 1)
    assert np.array_equal(slots[0], np.zeros(SLOT_BYTES, np.uint8))


@pytest.mark.parametrize("finished", [True, False])
def test_closing_waits_for_flushes_and_may_be_done_twice(
    memory: SlotMemory, tmp_path: Path, finished: bool
) -> None:
    slots = memory.reserve(SLOT_BYTES, 1)
    sealed_slot(STEP, slot=slots[0])
    memory.sealed(0, None)
    future = memory.flush(0, _order(tmp_path / "c", rate_bytes_per_s=40_000.0))
    del slots
    memory.close(finished=finished)
    assert future.result(20).step_id == STEP
    assert _whole(tmp_path / "c")
    memory.close(finished=finished)
    with pytest.raises(CheckpointError):
        memory.reserve(SLOT_BYTES, 1)
