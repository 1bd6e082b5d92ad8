"""The promise of snapshots, under every skew, skip, failure and death that the tests can think of.

An exhaustive model of two ranks with two slots; a state machine over ``support/snapshot_job.py``;
and tests that both notice when a rule is broken.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.snapshots.slots import (
    NEVER,
    NOTHING,
    Slots,
    SlotState,
    forget,
    newest_sealed,
    pick,
    release_needs,
)
from everstep.checkpoint.snapshots.tickets import Decision, Ticket, decide, encode, ticket_of
from tests.support.snapshot_job import Job, PromiseBroken, Rank, Rules

LAST_STEP = 6


class _Rank(NamedTuple):
    """A rank of the exhaustive model."""

    slots: Slots = (SlotState(), SlotState())
    done: int = 0
    failed: int | None = None
    posted: Ticket | None = None
    decision: Decision | None = None


_State = tuple[_Rank, _Rank]


def _with_slot(slots: Slots, index: int, slot: SlotState) -> Slots:
    return (*slots[:index], slot, *slots[index + 1 :])


def _capture(rank: _Rank, all_sealed: int) -> _Rank:
    index = pick(rank.slots, all_sealed)
    assert index is not None
    slot = SlotState(StepId(1, rank.done + 1), False, True)
    slots = _with_slot(rank.slots, index, slot)
    return rank._replace(slots=slots, done=rank.done + 1, decision=None)


def _seals(rank: _Rank) -> Iterator[_Rank]:
    """Its capture ends, if there is one."""
    for i, slot in enumerate(rank.slots):
        if slot.pinned:
            done = replace(slot, sealed=slot.step_id is not None, pinned=False)
            yield rank._replace(slots=_with_slot(rank.slots, i, done))


def _fails(rank: _Rank) -> Iterator[_Rank]:
    for i, slot in enumerate(rank.slots):
        if slot.pinned and slot.step_id is not None and rank.failed is None:
            slots = _with_slot(rank.slots, i, replace(slot, pinned=False))
            yield rank._replace(slots=slots, failed=slot.step_id.step)


def _alone(state: _State) -> Iterator[_State]:
    """Each rank takes its slots in turns, and skips while it still captures."""
    for me in (0, 1):
        rank = state[me]
        if rank.done == LAST_STEP:
            continue
        if release_needs(rank.slots) > newest_sealed(rank.slots):
            yield _put(state, me, rank._replace(done=rank.done + 1))
        else:
            yield _put(state, me, _capture(rank, newest_sealed(rank.slots)))


def _by_ticket(state: _State) -> Iterator[_State]:
    """Each rank posts; when both have, both know the decision, and carry it out in their time."""
    if state[0].posted and state[1].posted:
        both = [encode(rank.posted) for rank in state if rank.posted]
        reduced = [min(numbers) for numbers in zip(*both, strict=True)]
        a, b = (
            rank._replace(posted=None, decision=decide(reduced, rank.posted))
            for rank in state
            if rank.posted
        )
        yield a, b
    for me in (0, 1):
        rank = state[me]
        if rank.decision is None:
            if rank.posted is None and rank.done < LAST_STEP:
                ticket = ticket_of(rank.slots, generation=1, step=rank.done + 1, layout=1)
                yield _put(state, me, rank._replace(posted=replace(ticket, failed=rank.failed)))
        elif rank.decision.action == "capture":
            yield _put(state, me, _capture(rank, rank.decision.all_sealed))
        elif (void := rank.decision.void) is not None:
            slots, failed = forget(rank.slots, void), None if rank.failed == void else rank.failed
            after = rank._replace(slots=slots, failed=failed, done=rank.done + 1, decision=None)
            yield _put(state, me, after)
        else:
            yield _put(state, me, rank._replace(done=rank.done + 1, decision=None))


def _put(state: _State, me: int, rank: _Rank) -> _State:
    return (rank, state[1]) if me == 0 else (state[0], rank)


def _common(state: _State) -> int:
    """The newest step that both ranks hold sealed."""
    a, b = ({s.step_id for s in rank.slots if s.sealed and s.step_id} for rank in state)
    return max((step_id.step for step_id in a & b), default=NOTHING)


def _explore(saves: Callable[[_State], Iterator[_State]], *, failures: bool) -> tuple[int, int]:
    """Reach every state: how many there are, and in how many moves a common step was lost."""
    begin: _State = (_Rank(), _Rank())
    seen, waiting, lost = {begin}, [begin], 0
    while waiting:
        state = waiting.pop()
        reached = [*saves(state)]
        for me in (0, 1):
            reached += [_put(state, me, rank) for rank in _seals(state[me])]
            if failures:
                reached += [_put(state, me, rank) for rank in _fails(state[me])]
        for after in reached:
            lost += _common(after) < _common(state)
            if after not in seen:
                seen.add(after)
                waiting.append(after)
    return len(seen), lost


class TestTwoRanksWithTwoSlots:
    def test_ranks_that_skip_alone_lose_what_they_have_in_common(self) -> None:
        _, lost = _explore(_alone, failures=False)
        assert lost

    def test_tickets_lose_nothing_in_any_state(self) -> None:
        states, lost = _explore(_by_ticket, failures=True)
        assert not lost
        assert states > 1000


ACTS = ["step", "end_capture", "flush"]
CALM = 30
"""Acts before something breaks."""


class Protocol(RuleBasedStateMachine):
    """Anything in any order."""

    rules_of_job = Rules()
    calm = 0
    """Rules since the trainers began: those that die at once reach nothing."""

    @initialize(
        ranks=st.integers(1, 4), slots=st.integers(2, 4), every=st.sampled_from([None, 1, 3])
    )
    def begin(self, ranks: int, slots: int, every: int | None) -> None:
        self.job = Job(ranks, slots, every=every, rules=self.rules_of_job)

    def rank(self, number: int) -> Rank:
        return self.job.ranks[number % len(self.job.ranks)]

    @rule(acts=st.lists(st.tuples(st.sampled_from(ACTS), st.integers(0, 3)), min_size=1))
    def few_do(self, acts: list[tuple[str, int]]) -> None:
        for act, number in acts:
            self.act(act, self.rank(number))

    @rule(acts=st.lists(st.sampled_from(ACTS), min_size=1), slow=st.integers(0, 4))
    def all_do(self, acts: list[str], slow: int) -> None:
        for act in acts:
            for rank in self.job.ranks:
                if rank.number != slow:
                    self.act(act, rank)

    @rule(number=st.integers(0, 3))
    def fail_capture(self, number: int) -> None:
        for _ in range(2):
            for rank in self.job.ranks:
                self.act("step", rank)
        for rank in self.job.ranks:
            self.job.end_capture(rank, fails=rank is self.rank(number))

    def act(self, act: str, rank: Rank) -> None:
        getattr(self.job, act)(rank)
        self.job.check()
        self.calm += 1

    @rule(rounds=st.integers(1, 3))
    def all_goes_well(self, rounds: int) -> None:
        for act in ("step", "step", "end_capture") * rounds:
            for rank in self.job.ranks:
                self.act(act, rank)

    @rule()
    def fail_flush(self) -> None:
        self.job.fail_flush()

    @rule()
    def want_durable(self) -> None:
        self.job.want_durable()

    @precondition(lambda self: self.calm > CALM)
    @rule(number=st.integers(0, 3))
    def change_layout(self, number: int) -> None:
        self.job.change_layout(self.rank(number))

    @rule()
    def end_orphans(self) -> None:
        self.job.end_orphans()

    @precondition(lambda self: self.calm > CALM)
    @rule(flushes=st.sampled_from(["done", "lost", "running"]))
    def die(self, flushes: str) -> None:
        self.job.die(flushes)
        self.calm = 0

    @precondition(lambda self: self.calm > CALM)
    @rule(back=st.integers(0, 3))
    def go_back(self, back: int) -> None:
        self.job.die("lost", step=max(self.job.floor - back, 0))
        self.calm = 0

    @precondition(lambda self: self.calm > CALM)
    @rule(steps=st.integers(1, 4), freed=st.sets(st.integers(0, 3)))
    def detour(self, steps: int, freed: set[int]) -> None:
        self.job.detour(steps, freed)
        self.calm = 0

    @precondition(lambda self: self.calm > 2 * CALM)
    @rule(number=st.integers(0, 3))
    def lose_node(self, number: int) -> None:
        self.job.lose_node(self.rank(number))
        self.calm = 0

    @invariant()
    def promise(self) -> None:
        if hasattr(self, "job"):
            self.job.check()

    def teardown(self) -> None:
        if hasattr(self, "job"):
            self.job.settle()


TestProtocol = Protocol.TestCase
TestProtocol.settings = settings(max_examples=50, stateful_step_count=40)


@pytest.mark.slow
def test_protocol_at_length() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Protocol, settings=settings(max_examples=800, stateful_step_count=80)
    )


def _local_ticket(slots: Slots, **facts: Any) -> Ticket:
    """What this rank has sealed is enough for it."""
    ticket = ticket_of(slots, **facts)
    return replace(ticket, needs=NOTHING if release_needs(slots) <= ticket.sealed else NEVER)


def _local_pick(slots: Slots, all_sealed: int) -> int | None:
    return pick(slots, newest_sealed(slots))


def _unpinned(slots: Slots) -> Slots:
    return tuple(replace(slot, pinned=slot.pinned and not slot.sealed) for slot in slots)


def _ticket_without_pins(slots: Slots, **facts: Any) -> Ticket:
    return ticket_of(_unpinned(slots), **facts)


def _pick_without_pins(slots: Slots, all_sealed: int) -> int | None:
    return pick(_unpinned(slots), all_sealed)


def _own_decision(reduced: list[int], mine: Ticket, **facts: Any) -> Decision:
    """A rank without a slot skips; the others go on."""
    decision = decide(reduced, mine, **facts)
    if decision.action == "skip" and mine.needs <= decision.all_sealed:
        return replace(decision, action="capture")
    return decision


def _keep(slots: Slots, step: int) -> Slots:
    return slots


BROKEN = {
    "a local seal releases": Rules(ticket_of=_local_ticket, pick=_local_pick),
    "pins are ignored": Rules(ticket_of=_ticket_without_pins, pick=_pick_without_pins),
    "each rank skips alone": Rules(decide=_own_decision, must_agree=False),
    "a void step still counts": Rules(forget=_keep),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_the_machine_notices_a_broken_rule(broken: str) -> None:
    machine = type("Broken", (Protocol,), {"rules_of_job": BROKEN[broken]})
    quick = settings(
        max_examples=400,
        stateful_step_count=40,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    with pytest.raises(PromiseBroken):
        run_state_machine_as_test(machine, settings=quick)  # type: ignore[no-untyped-call]
