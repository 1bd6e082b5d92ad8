"""Which snapshots to make durable when nobody is left who could decide it (pure)."""

from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import TypeVar

from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.snapshots.memory import FlushOrder
from everstep.checkpoint.snapshots.slot_format import Seal

Held = TypeVar("Held")


def worth_flushing(
    held: Iterable[tuple[Held, Seal]], all_sealed: StepId | None
) -> tuple[list[Held], str]:
    """What is to be flushed of the sealed slots of a node, and why.

    Where all ranks of a job are on this node: the newest snapshot that all of them have sealed
    (of each run, if there was more than one under the job's name).
    Else all that this node has from ``all_sealed`` on: another node may know of a newer snapshot
    that all have sealed than this one was told, and only what every node flushes is committed.

    Args:
        held: slots, and what they hold.
        all_sealed: the newest snapshot of which this node knows that all ranks have sealed it.
    """
    snapshots: dict[tuple[bytes, int, StepId], dict[int, Held]] = defaultdict(dict)
    for what, seal in held:
        snapshots[seal.owner, seal.world_size, seal.step_id].setdefault(seal.rank, what)
    whole = sorted(
        (step_id, owner, world_size)
        for (owner, world_size, step_id), ranks in snapshots.items()
        if len(ranks) == world_size
    )
    if whole:
        newest = {owner: (owner, world_size, step_id) for step_id, owner, world_size in whole}
        chosen = [what for key in newest.values() for what in snapshots[key].values()]
        return chosen, f"step {whole[-1][0].step} is whole on this node"
    if all_sealed is None:
        return [], "no snapshot is known to be sealed on all ranks"
    chosen = [
        what
        for (_, _, step_id), ranks in snapshots.items()
        if step_id >= all_sealed
        for what in ranks.values()
    ]
    return chosen, f"all ranks had sealed step {all_sealed.step}, or a later one"


def is_hopeless(order: FlushOrder, here: Collection[int], seals: Iterable[Seal]) -> bool:
    """Whether a flush waits for a rank that died before it had sealed the step.

    Only known where all ranks of the job have their slots on this node; a step that is being
    flushed stays sealed until it is committed, or has failed.

    Args:
        order: of the flush.
        here: ranks that have slots on this node.
        seals: of all slots of this node; no trainer is left that could seal another.
    """
    everyone = set(range(order.world_size))
    sealed = {
        seal.rank
        for seal in seals
        if (seal.step_id, seal.world_size) == (order.step_id, order.world_size)
    }
    return everyone <= set(here) and not everyone <= sealed
