"""One decision for all ranks about the coming snapshot (pure).

Ranks that skip a step on their own soon hold no common one. So each rank posts a ticket; a MIN over
the tickets of all ranks is computed by an all-reduce beside the update; and each rank draws the
same decision from the same numbers: all capture, or all skip.

What all must agree on is posted together with its negation: the MIN of both shows the smallest and
the largest value. The MIN of the newest sealed steps is a step that *all* ranks hold, because all
capture the same steps, seal them in order, and report at once what they failed to capture; such a
step is void for all ranks (``slots.forget``), and until it is, nothing is released.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from everstep.checkpoint.snapshots.slots import NEVER, NOTHING, Slots, capture_needs, newest_sealed

TICKET_NUMBERS: Final = 12
"""How many int64 a ticket takes."""
_UNPLANNED: Final = 0


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """What one rank knows before a save.

    Raises:
        ValueError: a number is out of range, or the step was captured already.
    """

    generation: int
    step: int
    """The step of the coming save."""
    layout: int | None
    """63 bits that stand for the plan all ranks have agreed on (1 to 2**63 - 1); None where this
    rank has no plan yet, or its state does not fit it any more."""
    sealed: int
    """The newest step that this rank has sealed, or ``slots.NOTHING``."""
    needs: int
    """``slots.capture_needs`` of this rank."""
    failed: int | None = None
    """The oldest step that this rank failed to capture, as long as it is not void."""
    durable: int = NOTHING
    """The newest step that this rank knows to be durable, or the step that the run began with: what
    the interval is counted from."""
    flush_idle: bool = True
    """Nothing of this rank is being flushed, nor ordered to be."""
    due_by_time: bool = False
    """The interval in seconds has passed: the opinion of rank 0, which has the clock; False on all
    others."""

    def __post_init__(self) -> None:
        if not 0 <= self.generation < NEVER or not 0 <= self.step < NEVER:
            raise ValueError(f"generation {self.generation}, step {self.step}: not in 0 to 2**62")
        if self.layout is not None and not 0 < self.layout < 2**63:
            raise ValueError(f"layout {self.layout}: not in 1 to 2**63 - 1")
        if self.sealed >= self.step:
            raise ValueError(
                f"step {self.step} comes after step {self.sealed}, which is captured already: "
                "steps only grow"
            )


def ticket_of(slots: Slots, *, generation: int, step: int, layout: int | None) -> Ticket:
    """A ticket that says what the slots of this rank say; for the rest, ``dataclasses.replace``."""
    return Ticket(
        generation=generation,
        step=step,
        layout=layout,
        sealed=newest_sealed(slots),
        needs=capture_needs(slots),
    )


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What all ranks do with the coming save; equal on all of them."""

    action: Literal["capture", "skip", "replan", "out_of_step"]
    """``replan``: agree on a new plan, then post again. ``out_of_step``: this attempt has failed,
    since ranks are not where they should be."""
    reason: str
    """For people; empty for a capture."""
    all_sealed: int = NOTHING
    """The newest step that all ranks have sealed, as far as it is known (capture and skip)."""
    flush: bool = False
    """Make the snapshot durable once it is sealed: it is the first since the interval ended."""
    void: int | None = None
    """A step that some rank failed to capture: ``slots.forget`` it (skip)."""


def encode(ticket: Ticket) -> list[int]:
    """The numbers of a ticket, for an all-reduce MIN over int64; shape (TICKET_NUMBERS,)."""
    layout = _UNPLANNED if ticket.layout is None else ticket.layout
    return [
        ticket.generation,
        -ticket.generation,
        ticket.step,
        -ticket.step,
        layout,
        -layout,
        ticket.sealed,
        -ticket.needs,
        NEVER if ticket.failed is None else ticket.failed,
        ticket.durable,
        int(ticket.flush_idle),
        -int(ticket.due_by_time),
    ]


def decide(reduced: Sequence[int], mine: Ticket, *, durable_every: int | None = None) -> Decision:
    """What to do, from the elementwise MIN of the tickets of all ranks.

    Args:
        reduced: the result of the all-reduce.
        mine: what this rank posted; only to see that ``reduced`` is about it.
        durable_every: steps between durable snapshots, the same on all ranks; None: no such
            interval.

    An interval that ends while a flush is running somewhere, or at a step that is skipped, is made
    up for by the next capture that finds all ranks idle.

    Raises:
        ValueError: ``reduced`` is not a minimum with this rank's ticket among them.
    """
    posted = encode(mine)
    if len(reduced) != len(posted) or any(r > p for r, p in zip(reduced, posted, strict=True)):
        raise ValueError(f"{list(reduced)} is not the MIN of tickets with {posted} among them")
    generation, last_generation, step, last_step, layout, last_layout = (
        sign * number for sign, number in zip((1, -1) * 3, reduced, strict=False)
    )
    sealed, needs, failed, durable = reduced[6], -reduced[7], reduced[8], reduced[9]
    if generation != last_generation:
        return Decision(
            action="out_of_step",
            reason=f"ranks are in different attempts, generation {generation} to {last_generation}",
        )
    if step != last_step:
        return Decision(
            action="out_of_step", reason=f"ranks are at different steps, {step} to {last_step}"
        )
    if layout != last_layout:
        return Decision(action="replan", reason="ranks do not hold what they agreed on")
    if layout == _UNPLANNED:
        return Decision(action="replan", reason="no rank has a plan")
    if failed != NEVER:
        return Decision(
            action="skip", reason=f"a rank failed to capture step {failed}", void=failed
        )
    if not may_capture(needs, sealed):
        return Decision(action="skip", reason=_why_no_slot(needs), all_sealed=sealed)
    due = reduced[11] < 0 or (
        durable_every is not None and step // durable_every > max(durable, 0) // durable_every
    )
    return Decision(action="capture", reason="", all_sealed=sealed, flush=due and bool(reduced[10]))


def may_capture(needs: int, all_sealed: int) -> bool:
    """Whether a rank with these needs can capture.

    For a save that must not be skipped: after a skip, a rank waits until nothing of its own is in
    the way (``may_capture(capture_needs(slots), newest_sealed(slots))``: its captures have ended,
    and a pin is gone), and posts again for the same step.
    """
    return needs <= all_sealed


def _why_no_slot(needs: int) -> str:
    if needs == NEVER:
        return "every slot of some rank is still in use (copied to, flushed or read)"
    return f"some rank has not sealed step {needs} yet"
