"""Tickets: what each field does to the decision of all ranks."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.snapshots.slots import NEVER, NOTHING, SlotState
from everstep.checkpoint.snapshots.tickets import (
    TICKET_NUMBERS,
    Decision,
    Ticket,
    decide,
    encode,
    may_capture,
    ticket_of,
)

GOOD = Ticket(generation=2, step=8, layout=77, sealed=7, needs=7, durable=4)


def _reduced(*tickets: Ticket) -> list[int]:
    return [min(numbers) for numbers in zip(*map(encode, tickets), strict=True)]


def _decide(*tickets: Ticket, durable_every: int | None = None) -> Decision:
    """The decision of all ranks, which must be the same."""
    reduced = _reduced(*tickets)
    decisions = [decide(reduced, mine, durable_every=durable_every) for mine in tickets]
    assert decisions == decisions[:1] * len(tickets)
    return decisions[0]


def _with(**changes: Any) -> Ticket:
    return replace(GOOD, **changes)


def test_all_capture() -> None:
    assert _decide(GOOD) == Decision(action="capture", reason="", all_sealed=7)
    assert _decide(GOOD, GOOD, GOOD) == _decide(GOOD)


def test_a_rank_that_has_nothing_sealed_yet() -> None:
    decision = _decide(GOOD, _with(sealed=NOTHING, needs=NOTHING))
    assert (decision.action, decision.all_sealed) == ("skip", NOTHING)
    first = _with(sealed=NOTHING, needs=NOTHING)
    assert _decide(first, first) == Decision(action="capture", reason="")


def test_one_rank_without_a_slot_makes_all_skip() -> None:
    decision = _decide(GOOD, _with(needs=NEVER))
    assert decision == Decision(action="skip", reason=decision.reason, all_sealed=7)
    assert "in use" in decision.reason


def test_one_rank_that_lags_makes_all_skip() -> None:
    decision = _decide(GOOD, _with(sealed=6, needs=NOTHING))
    assert (decision.action, decision.all_sealed) == ("skip", 6)
    assert "not sealed step 7 yet" in decision.reason


def test_a_failed_capture_is_void_for_all_and_nothing_is_released() -> None:
    decision = _decide(GOOD, _with(failed=6), _with(failed=5))
    assert (decision.action, decision.void, decision.all_sealed) == ("skip", 5, NOTHING)
    assert "step 5" in decision.reason


def test_layouts() -> None:
    assert _decide(GOOD, _with(layout=78)).action == "replan"
    assert _decide(GOOD, _with(layout=None)).action == "replan"
    assert _decide(_with(layout=None), _with(layout=None)).action == "replan"
    assert _decide(_with(layout=2**63 - 1), _with(layout=2**63 - 1)).action == "capture"
    assert _decide(_with(layout=2**63 - 1), _with(layout=2**63 - 2)).action == "replan"


def test_ranks_that_are_elsewhere() -> None:
    decision = _decide(GOOD, _with(step=9), _with(step=11))
    assert decision.action == "out_of_step"
    assert "different steps, 8 to 11" in decision.reason
    decision = _decide(GOOD, _with(generation=3, step=9))
    assert decision.action == "out_of_step"
    assert "generation 2 to 3" in decision.reason


@pytest.mark.parametrize(
    ("durable_every", "flush"),
    [(None, False), (1, True), (3, True), (4, True), (5, True), (9, False)],
)
def test_the_interval_in_steps(durable_every: int | None, flush: bool) -> None:
    assert _decide(GOOD, GOOD, durable_every=durable_every).flush is flush


def test_the_interval_counts_from_what_all_ranks_know_to_be_durable() -> None:
    assert _decide(GOOD, _with(durable=3), durable_every=5).flush


def test_the_interval_in_seconds_is_the_opinion_of_one_rank() -> None:
    assert not _decide(GOOD, GOOD).flush
    assert _decide(_with(due_by_time=True), GOOD).flush
    assert _decide(_with(due_by_time=True), GOOD, durable_every=100).flush


def test_no_flush_while_one_is_running_anywhere() -> None:
    busy = _with(flush_idle=False)
    assert not _decide(GOOD, busy, durable_every=1).flush
    assert not _decide(_with(due_by_time=True), busy).flush


def test_a_ticket_says_what_the_slots_say() -> None:
    slots = (SlotState(StepId(2, 6), True), SlotState(StepId(2, 7), True))
    assert ticket_of(slots, generation=2, step=8, layout=77) == _with(durable=NOTHING)


def test_may_capture() -> None:
    assert may_capture(NOTHING, NOTHING)
    assert may_capture(5, 5)
    assert not may_capture(5, 4)
    assert not may_capture(NEVER, NEVER - 1)


@pytest.mark.parametrize(
    "changes",
    [{"layout": 0}, {"layout": 2**63}, {"generation": -1}, {"step": -1}, {"step": 7}],
)
def test_tickets_that_make_no_sense(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        _with(**changes)


def test_a_reduction_without_the_own_ticket() -> None:
    with pytest.raises(ValueError, match="MIN"):
        decide(encode(_with(sealed=8, step=9)), GOOD)
    with pytest.raises(ValueError, match="MIN"):
        decide(encode(GOOD)[:-1], GOOD)


steps = st.integers(NOTHING, 12)
tickets = st.builds(
    Ticket,
    generation=st.integers(0, 2),
    step=st.integers(13, 15),
    layout=st.none() | st.integers(1, 3) | st.just(2**63 - 1),
    sealed=steps,
    needs=steps | st.just(NEVER),
    failed=st.none() | st.integers(0, 12),
    durable=steps,
    flush_idle=st.booleans(),
    due_by_time=st.booleans(),
)


def _slow(tickets: list[Ticket], durable_every: int | None) -> tuple[str, int, bool, int | None]:
    """The decision of somebody who sees all tickets."""
    if len({(t.generation, t.step) for t in tickets}) > 1:
        return "out_of_step", NOTHING, False, None
    if len({t.layout for t in tickets}) > 1 or tickets[0].layout is None:
        return "replan", NOTHING, False, None
    if failed := [t.failed for t in tickets if t.failed is not None]:
        return "skip", NOTHING, False, min(failed)
    all_sealed = min(t.sealed for t in tickets)
    if any(t.needs > all_sealed for t in tickets):
        return "skip", all_sealed, False, None
    steps_ended = durable_every is not None and any(
        t.step - t.durable >= durable_every for t in tickets
    )
    due = steps_ended or any(t.due_by_time for t in tickets)
    return "capture", all_sealed, due and all(t.flush_idle for t in tickets), None


@given(st.lists(tickets, min_size=1, max_size=4), st.none() | st.integers(1, 20))
def test_the_minimum_tells_all_that_matters(ranks: list[Ticket], durable_every: int | None) -> None:
    assert all(len(encode(ticket)) == TICKET_NUMBERS for ticket in ranks)
    decision = _decide(*ranks, durable_every=durable_every)
    assert (decision.action, decision.all_sealed, decision.flush, decision.void) == _slow(
        ranks, durable_every
    )
    assert bool(decision.reason) == (decision.action != "capture")
    assert all(-(2**63) <= n < 2**63 for n in _reduced(*ranks))
