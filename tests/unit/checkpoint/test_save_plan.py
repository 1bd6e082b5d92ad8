"""The pack of each rank, planned once and again only when a layout changes."""

from typing import Any

import pytest

from everstep.checkpoint.collective import SingleProcess
from everstep.checkpoint.errors import LayoutError
from everstep.checkpoint.layout import Box, Fragment, TensorSpec
from everstep.checkpoint.pack import PackPlan
from everstep.checkpoint.save_plan import SavePlan
from tests.support.checkpoints import ThreadCollective, run_threads

SPEC = TensorSpec("w", "F32", (4,))
SHARED = TensorSpec("s", "F32", (100,))


def _fragments(rank: int) -> list[Fragment]:
    return [Fragment(SPEC, Box((2 * rank,), (2,))), Fragment(SHARED, SHARED.whole)]


def _plan(plan: SavePlan, c: ThreadCollective, layout: list[Fragment]) -> PackPlan:
    digest = plan.digest(layout)
    plan.update([d.decode() for d in c.exchange("digests", digest.encode())])
    return plan.pack()


def test_ranks_plan_the_same_thing_apart() -> None:
    plans = run_threads(lambda c: _plan(SavePlan(c), c, _fragments(c.rank)), 2)
    assert [p.rank for p in plans] == [0, 1]
    assert [[f.key for f in p.fragments] for p in plans] == [["s", "w[0:2]"], ["w[2:4]"]]


def test_layouts_are_exchanged_only_when_one_has_changed() -> None:
    def run(c: ThreadCollective) -> Any:
        plan = SavePlan(c)
        first = _plan(plan, c, _fragments(c.rank))
        assert _plan(plan, c, _fragments(c.rank)) is first
        more = TensorSpec("x", "F32", (1,))
        changed = _fragments(c.rank) + ([Fragment(more, more.whole)] if c.rank == 1 else [])
        again = _plan(plan, c, changed)
        return c.tags, [f.key for f in again.fragments]

    for tags, _ in (results := run_threads(run, 2)):
        assert tags == ["digests", "layouts", "digests", "digests", "layouts"]
    assert results[1][1] == ["w[2:4]", "x"]


def test_after_a_disagreement_the_next_save_can_be_planned() -> None:
    def run(c: ThreadCollective) -> Any:
        plan = SavePlan(c)
        odd = TensorSpec("w", "F32", (4 + c.rank,))
        for _ in range(2):
            with pytest.raises(LayoutError, match="'w' is F32"):
                _plan(plan, c, [Fragment(odd, odd.whole)])
        return _plan(plan, c, _fragments(c.rank)).rank

    assert run_threads(run, 2) == [0, 1]


def test_nothing_held() -> None:
    plan = SavePlan(SingleProcess())
    plan.update([plan.digest([])])
    assert plan.pack().fragments == ()
