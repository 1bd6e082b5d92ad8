"""Which checkpoints to delete (pure)."""

from collections.abc import Iterable, Sequence

from everstep.checkpoint.lineage import StepId


def superfluous(
    committed: Iterable[StepId], lineage: Sequence[StepId], keep: int, current: int
) -> list[StepId]:
    """The committed steps that may go, oldest first.

    Args:
        committed: everything in the directory.
        lineage: what the current generation may resume from, ascending by step.
        keep: how many of the newest of these to keep, at least 1.
        current: number of the current generation.

    Steps outside the lineage (a parent's steps after the fork) go too, but only once the current
    generation has committed something of its own; the newest step of the lineage is never among
    them.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least the newest checkpoint is kept")
    kept, inherited = set(lineage[-keep:]), set(lineage)
    wrote = any(s.generation == current for s in lineage)
    return sorted(s for s in committed if s not in kept and (wrote or s in inherited))
