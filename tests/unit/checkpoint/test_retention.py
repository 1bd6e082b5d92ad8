"""What is deleted, and what never is."""

import itertools

import pytest

from everstep.checkpoint.lineage import Generation, StepId, in_lineage
from everstep.checkpoint.retention import abandoned, superfluous


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


def _generations(**created_s: float) -> dict[int, Generation]:
    return {
        int(name[1:]): Generation(
            number=int(name[1:]), parent=None, fork_step=None, created_s=at, mesh={}
        )
        for name, at in created_s.items()
    }


@pytest.mark.parametrize(
    ("uncommitted", "now_s", "expected"),
    [
        ([StepId(2, 10)], 5000.0, [StepId(2, 10)]),  # it has committed a later one
        ([StepId(2, 30)], 99999.0, []),  # being written
        ([StepId(1, 50)], 5000.0, []),  # the older job may not know yet
        ([StepId(1, 50)], 5600.0, [StepId(1, 50)]),
        ([StepId(3, 1)], 99999.0, []),  # a generation that began just now
    ],
)
def test_what_nobody_can_be_writing(
    uncommitted: list[StepId], now_s: float, expected: list[StepId]
) -> None:
    generations = _generations(g1=1000.0, g2=2000.0)
    committed = [StepId(1, 5), StepId(2, 20)]
    found = abandoned(uncommitted, committed, generations, now_s=now_s, grace_s=3600.0)
    assert found == expected


def test_without_generations_nothing_is_abandoned() -> None:
    assert abandoned([StepId(1, 1)], [], {}, now_s=1e12, grace_s=0.0) == []
