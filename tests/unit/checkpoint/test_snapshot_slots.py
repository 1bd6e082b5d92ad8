"""The release rule, slot by slot."""

import itertools

import pytest

from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.snapshots.slots import (
    NEVER,
    NOTHING,
    Slots,
    SlotState,
    adopt,
    capture_needs,
    forget,
    newest_sealed,
    pick,
    release_needs,
    slots_needed,
)


def _slots(text: str) -> Slots:
    """``"5 7p 8u -"``: sealed, sealed and pinned, given up (not sealed), empty; 'c': captured."""
    return tuple(_slot(word) for word in text.split())


def _slot(word: str) -> SlotState:
    if word.startswith("-"):
        return SlotState(None, False, "p" in word)
    step = StepId(1, int(word.rstrip("puc")))
    return SlotState(step, not {"u", "c"} & {*word}, bool({"p", "c"} & {*word}))


@pytest.mark.parametrize(
    ("slots", "needs"),
    [
        ("- -", NOTHING),
        ("5 -", NOTHING),
        ("5 6u", NOTHING),  # given up
        ("5 6", 6),
        ("6 5", 6),
        ("4 5 6", 5),
        ("4p 5 6", 6),
        ("4 5p 6", 5),  # that the newer one is pinned does not matter
        ("4 9", 9),
        ("5 6c", NEVER),  # nothing newer than 5 is sealed yet
        ("4 5 6c", 5),
        ("5p 6", NEVER),  # never the newest
        ("5p 6p", NEVER),
        ("6", NEVER),
        ("-p 6", NEVER),  # void, but still being read
    ],
)
def test_what_a_rank_waits_for(slots: str, needs: int) -> None:
    assert release_needs(_slots(slots)) == needs


@pytest.mark.parametrize(
    ("slots", "needs"),
    [("- -", NOTHING), ("- 6c", 6), ("4 5 6c", 6), ("4 5", 5), ("4 5 -p", 5), ("4 6u", NOTHING)],
)
def test_a_capture_waits_for_the_one_before(slots: str, needs: int) -> None:
    assert capture_needs(_slots(slots)) == needs


@pytest.mark.parametrize(
    ("slots", "all_sealed", "picked"),
    [
        ("- -", NOTHING, 0),
        ("5 -", 5, 1),
        ("5 6", 6, 0),
        ("6 5", 6, 1),
        ("5 6", 5, None),  # another rank has not sealed 6
        ("4 5 6", 5, 0),
        ("4 5 6", 6, 0),  # the oldest first
        ("4p 5 6", 6, 1),
        ("4p 5 6", 5, None),
        ("4 5 6u", 4, 2),
        ("4 5 6c", 4, None),
        ("5p 6p", 6, None),
        ("6", 6, None),
    ],
)
def test_which_slot_is_given_away(slots: str, all_sealed: int, picked: int | None) -> None:
    assert pick(_slots(slots), all_sealed) == picked


def test_there_is_a_slot_exactly_when_the_needs_are_met() -> None:
    words = ["-", "-p", "3", "3p", "3u", "4", "4p", "4u", "4c", "5", "5p", "5c"]
    for chosen in itertools.product(words, repeat=3):
        steps = [word.rstrip("puc") for word in chosen if word[0] != "-"]
        if len(steps) != len(set(steps)):
            continue
        slots = _slots(" ".join(chosen))
        for all_sealed in (NOTHING, 2, 3, 4, 5, 6):
            index = pick(slots, all_sealed)
            assert (index is not None) == (release_needs(slots) <= all_sealed)
            if index is not None and slots[index].sealed:
                given = slots[index]
                assert not given.pinned
                assert given.step_id is not None
                assert given.step_id.step < min(newest_sealed(slots), all_sealed)


def test_a_void_step_counts_no_more() -> None:
    assert forget(_slots("4 5"), 5) == _slots("4 -")
    assert forget(_slots("4 5p"), 5) == _slots("4 -p")
    assert forget(_slots("4 5c"), 5) == _slots("4 -p")
    assert forget(_slots("4 5"), 6) == _slots("4 5")


class TestAdopt:
    def test_the_restored_one_stays(self) -> None:
        assert adopt(_slots("4 6 5"), StepId(1, 5)) == _slots("- - 5")

    def test_nothing_stays_where_the_restored_one_is_elsewhere(self) -> None:
        assert adopt(_slots("3 4 5"), StepId(2, 7)) == _slots("- - -")

    def test_other_lineages_go(self) -> None:
        slots = (SlotState(StepId(1, 5), True), SlotState(StepId(2, 5), True))
        assert adopt(slots, StepId(2, 5)) == (SlotState(), slots[1])

    def test_what_was_not_sealed_goes(self) -> None:
        assert adopt(_slots("4u 5"), StepId(1, 5)) == _slots("- 5")

    def test_a_pin_stays(self) -> None:
        assert adopt(_slots("6p 5p"), StepId(1, 5)) == _slots("-p 5p")

    def test_everything_goes_after_a_restore_from_storage(self) -> None:
        assert adopt(_slots("4 5p"), None) == _slots("- -p")


def test_how_many_slots() -> None:
    assert slots_needed(flush=False, protect=False) == 2
    assert slots_needed(flush=True, protect=False) == 3
    assert slots_needed(flush=True, protect=True) == 4
