"""Which slot of a rank may be overwritten (pure).

A slot is given away only when all ranks have sealed a snapshot that is newer than what it holds,
and nothing pins it. The newest snapshot that all ranks have sealed is therefore always there, on
all of them, whatever dies (``tests/property/test_snapshot_protocol.py``). Every rank says in its
ticket which step it waits for (``release_needs``), and whether that is sealed everywhere is decided
for all ranks at once (``tickets.py``).

A rank seals its snapshots in the order of their steps, and the steps of its slots differ.
"""

from dataclasses import dataclass, replace
from typing import Final

from everstep.checkpoint.lineage import StepId

NOTHING: Final = -1
"""In place of a step: none is sealed; none is needed."""
NEVER: Final = 2**62
"""In place of a step: larger than any."""


@dataclass(frozen=True)
class SlotState:
    """What is known of one slot of this rank."""

    step_id: StepId | None = None
    """The snapshot that it holds or is being captured into it; None: nothing that counts."""
    sealed: bool = False
    """The snapshot is complete."""
    pinned: bool = False
    """Something uses the memory: a capture (until it is sealed or given up), a flush, an encoding
    or a reader."""


Slots = tuple[SlotState, ...]


def slots_needed(*, flush: bool, protect: bool) -> int:
    """How many slots let a rank capture every step.

    Two take turns; each use that may outlast a step keeps another one busy.

    Args:
        flush: snapshots are made durable.
        protect: snapshots are encoded.
    """
    return 2 + flush + protect


def newest_sealed(slots: Slots) -> int:
    """The newest step that this rank has sealed; ``NOTHING`` if there is none."""
    return max(_sealed_steps(slots), default=NOTHING)


def release_needs(slots: Slots) -> int:
    """The oldest step that all ranks must have sealed before this rank can give a slot away.

    Returns:
        ``NOTHING`` where a slot is free: it holds nothing, or a capture that was given up.
        ``NEVER`` where no seal of another rank would help: every slot is pinned, or holds the
        newest snapshot of this rank.
    """
    if any(_is_free(slot) for slot in slots):
        return NOTHING
    return min((_successor(slots, slot) for slot in slots if not slot.pinned), default=NEVER)


def capture_needs(slots: Slots) -> int:
    """The oldest step that all ranks must have sealed before this rank may capture the next one.

    What a slot needs (``release_needs``), and what is still being captured: one capture begins when
    the one before is sealed on all ranks, so that a loss of processes costs one step at most.
    """
    under_way = [_step(slot) for slot in slots if slot.pinned and not slot.sealed]
    return max([release_needs(slots), *under_way])


def pick(slots: Slots, all_sealed: int) -> int | None:
    """Index of the slot to capture into; None if there is none.

    Args:
        slots: of this rank.
        all_sealed: the newest step that all ranks have sealed, or ``NOTHING``.

    Free slots come first, then the oldest snapshot that may go. There is one if and only if
    ``release_needs(slots) <= all_sealed``: whoever posts a ticket keeps to what it says, and pins
    no further slot until the decision is carried out.
    """
    eligible = [
        (NOTHING if free else _step(slot), index)
        for index, slot in enumerate(slots)
        if (free := _is_free(slot)) or (not slot.pinned and _successor(slots, slot) <= all_sealed)
    ]
    return min(eligible)[1] if eligible else None


def forget(slots: Slots, step: int) -> Slots:
    """The slots after a rank has failed to capture a step: no rank counts it any more.

    A slot that is pinned stays so until its use ends; a capture into it is not to be sealed.
    """
    return tuple(
        replace(slot, step_id=None, sealed=False)
        if slot.step_id is not None and slot.step_id.step == step
        else slot
        for slot in slots
    )


def adopt(slots: Slots, restored: StepId | None) -> Slots:
    """The slots of a rank that goes on after a restart.

    Args:
        slots: as the attempt before left them.
        restored: the snapshot in memory that all ranks go on from; None if they go on from durable
            storage, or from nothing.

    The restored snapshot stays until a later one is sealed by all ranks, everything else counts as
    nothing. Older ones must not stay: other ranks may not hold them any more, as they were freed by
    an attempt with another number of ranks, or are on a node that the rank has left; and a rank
    whose slots are full would then wait for ever for others to seal a step that is past.
    """
    return tuple(
        slot
        if slot.sealed and slot.step_id is not None and slot.step_id == restored
        else replace(slot, step_id=None, sealed=False)
        for slot in slots
    )


def _is_free(slot: SlotState) -> bool:
    return not slot.sealed and not slot.pinned


def _step(slot: SlotState) -> int:
    return NOTHING if slot.step_id is None else slot.step_id.step


def _sealed_steps(slots: Slots) -> list[int]:
    return [_step(slot) for slot in slots if slot.sealed]


def _successor(slots: Slots, slot: SlotState) -> int:
    """The step that this rank sealed after that of ``slot``; ``NEVER`` if there is none."""
    return min((step for step in _sealed_steps(slots) if step > _step(slot)), default=NEVER)
