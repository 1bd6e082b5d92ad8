"""Which checkpoints to delete (pure)."""

from collections.abc import Iterable, Mapping, Sequence

from everstep.checkpoint.lineage import Generation, StepId


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


def abandoned(
    uncommitted: Iterable[StepId],
    committed: Iterable[StepId],
    generations: Mapping[int, Generation],
    *,
    now_s: float,
    grace_s: float,
) -> list[StepId]:
    """The half-written steps that nobody can be writing any more, on a store without a lock.

    Args:
        uncommitted: steps without a manifest.
        committed: steps with one.
        generations: all of them, by number.
        now_s: the time, seconds since the epoch.
        grace_s: how long a writer may need to notice that a newer generation has begun.

    The newest generation saves one step after the other: what lies before a committed one of its
    own, it has given up. Older generations stop at their next save; what they were writing then is
    left alone until the newest generation is older than ``grace_s``.
    """
    newest = max(generations, default=0)
    own = max((s.step for s in committed if s.generation == newest), default=-1)
    stale = newest in generations and now_s - generations[newest].created_s >= grace_s
    return sorted(
        s
        for s in uncommitted
        if (s.generation == newest and s.step < own) or (s.generation < newest and stale)
    )
