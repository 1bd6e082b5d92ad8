"""The table of slots: room, pins, and what may be freed."""

from collections.abc import Callable

import pytest

from everstep.checkpoint.errors import SlotMemoryError
from everstep.checkpoint.keeper import segments
from everstep.checkpoint.keeper.slots import SetShape, SlotTable
from everstep.checkpoint.lineage import StepId
from tests.support.keepers import SLOT_BYTES, seal

Freed = list[SetShape]


def table(available_bytes: int = 2**30) -> tuple[SlotTable, Freed]:
    freed: Freed = []
    return SlotTable(2**24, freed.append, available_bytes=lambda: available_bytes), freed


def add(to: SlotTable, rank: int = 0, slots: int = 2, slot_bytes: int = SLOT_BYTES) -> SetShape:
    shape = SetShape.new(rank, slot_bytes, slots)
    to.promise(shape)
    assert to.add(shape, [segments.create(slot_bytes) for _ in range(slots)])
    to.use(shape.set_id)
    return shape


def test_the_host_may_have_less_than_the_budget() -> None:
    slots, _ = table(available_bytes=5 * SLOT_BYTES)
    first, second = SetShape.new(0, SLOT_BYTES, 3), SetShape.new(1, SLOT_BYTES, 3)
    slots.promise(first)
    with pytest.raises(SlotMemoryError, match=f"has {2 * SLOT_BYTES} available"):
        slots.promise(second)
    slots.break_promise(first)
    slots.promise(second)
    slots.close()


def test_a_set_is_added_once() -> None:
    slots, _ = table()
    shape = add(slots)
    assert not slots.add(shape, [segments.create(SLOT_BYTES) for _ in range(2)])
    assert slots.size_bytes == 2 * SLOT_BYTES
    with pytest.raises(ValueError, match="not 3 slots of one size"):
        slots.add(SetShape.new(0, SLOT_BYTES, 3), [segments.create(SLOT_BYTES)])
    slots.close()
    assert slots.size_bytes == 0


def test_the_set_in_use_is_found_first() -> None:
    slots, _ = table()
    old, new = add(slots), add(slots)
    slots.use(old.set_id)
    for expected in (old, new):
        found = slots.find(0, SLOT_BYTES, 2)
        assert found is not None
        assert found.shape == expected
        slots.use(new.set_id)
    assert slots.find(1, SLOT_BYTES, 2) is None
    assert slots.find(0, SLOT_BYTES, 3) is None
    slots.close()


def test_what_is_needed_is_freed_later() -> None:
    slots, freed = table()
    old, new = add(slots), add(slots, slots=1)
    slot = slots.slot(old.set_id, 1)
    assert slot is not None
    for _ in range(2):
        slots.pin(slot)
    slots.free_others(0)
    slots.unpin(slot)
    assert freed == []
    slots.unpin(slot)
    assert freed == [old]
    assert [each.shape for each in slots.sets()] == [new]
    slots.free_rank(0)
    assert freed == [old, new]


def test_a_set_that_is_used_again_is_not_freed() -> None:
    slots, freed = table()
    old = add(slots)
    add(slots, slots=1)
    slot = slots.slot(old.set_id, 0)
    assert slot is not None
    slots.pin(slot)
    slots.free_others(0)
    slots.use(old.set_id)
    slots.unpin(slot)
    assert freed == []
    slots.close()


@pytest.mark.parametrize(
    ("alive", "all_sealed", "is_freed"),
    [
        (set(), None, False),
        (set(), StepId(1, 5), False),
        (set(), StepId(1, 6), True),
        (set(), StepId(2, 0), True),
        ({1}, StepId(1, 6), False),
    ],
)
def test_what_lost_ranks_have(alive: set[int], all_sealed: StepId | None, is_freed: bool) -> None:
    slots, freed = table()
    shape = SetShape.new(1, SLOT_BYTES, 2)
    fds = [segments.create(SLOT_BYTES) for _ in range(2)]
    seal(segments.map_slot(fds[0], writable=True), 5, rank=1, world_size=2)
    slots.add(shape, fds)
    slots.free_surpassed(alive, all_sealed)
    assert freed == ([shape] if is_freed else [])
    slots.close()


def test_a_slot_of_another_rank_is_not_sealed() -> None:
    slots, _ = table()
    shape = SetShape.new(1, SLOT_BYTES, 1)
    fd = segments.create(SLOT_BYTES)
    seal(segments.map_slot(fd, writable=True), 5, rank=0, world_size=2)
    slots.add(shape, [fd])
    found = slots.slot(shape.set_id, 0)
    assert found is not None
    assert found.seal() is None
    assert slots.slot(shape.set_id, 1) is None
    slots.close()


@pytest.mark.parametrize(
    "change",
    [
        {"slots": 0},
        {"slots": 65},
        {"slot_bytes": 4097},
        {"rank": -1},
        {"set_id": 3},
        {"slots": "2"},
    ],
)
def test_shapes_that_are_none(change: dict[str, object]) -> None:
    coded = SetShape.new(0, SLOT_BYTES, 2).as_json()
    decode: Callable[[dict[str, object]], SetShape] = SetShape.from_json
    assert decode(coded).as_json() == coded
    with pytest.raises(ValueError):
        decode({**coded, **change})
