"""What is deleted, and what never is."""

import itertools

import pytest

from everstep.checkpoint.lineage import Generation, StepId, in_lineage
from everstep.checkpoint.retention import superfluous


def _ids(text: str) -> list[StepId]:
    """``_ids("1:10 1:20 2:15")``: generation and step."""
    return [StepId(*map(int, word.split(":"))) for word in text.split()]


def test_the_newest_are_kept() -> None:
    steps = _ids("1:10 1:20 1:30 1:40")
    assert superfluous(steps, steps, keep=2, current=1) == _ids("1:10 1:20")
    assert superfluous(steps, steps, keep=9, current=1) == []


def test_steps_after_a_fork_stay_until_the_fork_has_saved() -> None:
    inherited = _ids("1:10 1:20")
    before = [*inherited, *_ids("1:30 1:40")]
    assert superfluous(before, inherited, keep=2, current=2) == []
    after = [*before, *_ids("2:25")]
    lineage = [*inherited, *_ids("2:25")]
    assert superfluous(after, lineage, keep=3, current=2) == _ids("1:30 1:40")
    assert superfluous(after, lineage, keep=1, current=2) == _ids("1:10 1:20 1:30 1:40")


def test_at_least_one_is_kept() -> None:
    with pytest.raises(ValueError, match="keep=0"):
        superfluous([], [], keep=0, current=1)


def test_never_the_newest_whatever_the_history() -> None:
    generations = {
        1: Generation(number=1, parent=None, fork_step=None, created_s=0.0, mesh={}),
        2: Generation(number=2, parent=1, fork_step=2, created_s=0.0, mesh={}),
    }
    possible = _ids("1:1 1:2 1:3 2:2 2:3 2:4")
    for count in range(1, len(possible) + 1):
        for committed in itertools.combinations(possible, count):
            lineage = in_lineage(generations, committed)
            for keep in (1, 2, 3):
                gone = superfluous(committed, lineage, keep, current=2)
                left = in_lineage(generations, set(committed) - set(gone))
                assert left == lineage[-keep:]
                if not any(s.generation == 2 for s in committed):
                    assert all(s in lineage for s in gone)
