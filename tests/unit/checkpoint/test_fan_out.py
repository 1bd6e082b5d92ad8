"""Who fetches what for whom: every needed block once, evenly, a little at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.checkpoint.fan_out import ROUND_BLOCKS, plan_fan_out
from everstep.checkpoint.ranged_plan import Blocks


@st.composite
def needs(draw: st.DrawFn) -> list[dict[int, Blocks]]:
    """What up to four ranks need of up to three packs."""
    sizes = draw(st.lists(st.integers(0, 60), min_size=1, max_size=3))
    found = []

    def blocks(n: int) -> Blocks:
        return np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)), bool)

    for _ in range(draw(st.integers(1, 4))):
        packs = draw(st.sets(st.sampled_from(range(len(sizes)))))
        found.append({p: blocks(sizes[p]) for p in sorted(packs)})
    return found


@settings(deadline=None)
@given(needs())
def test_every_needed_block_is_fetched_once_and_reaches_its_needers(
    wanted: list[dict[int, Blocks]],
) -> None:
    rounds = plan_fan_out(wanted)
    deliveries = [d for deliveries in rounds for d in deliveries]
    assert [d.window for d in deliveries] == sorted(d.window for d in deliveries)
    for rank, blocks in enumerate(wanted):
        got = [
            (d.window.pack, block)
            for d in deliveries
            if rank in d.needers
            for block in range(d.window.begin, d.window.end)
        ]
        assert len(set(got)) == len(got)
        assert {(p, b) for p in blocks for b in np.flatnonzero(blocks[p])} <= set(got)
    for each in rounds:
        assert each
        for rank in range(len(wanted)):
            mine = [d.window.end - d.window.begin for d in each if rank in d.needers]
            assert sum(mine) <= ROUND_BLOCKS
    assert all(d.reader in d.needers for d in deliveries)


@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_replicas_share_the_reading(world_size: int) -> None:
    rounds = plan_fan_out([{0: np.ones(240, bool)}] * world_size)
    fetched = [0] * world_size
    for delivery in (d for deliveries in rounds for d in deliveries):
        fetched[delivery.reader] += delivery.window.end - delivery.window.begin
        assert delivery.needers == tuple(range(world_size))
    assert sum(fetched) == 240
    assert max(fetched) - min(fetched) <= 4


def test_nothing_is_needed() -> None:
    assert plan_fan_out([{}, {0: np.zeros(5, bool)}]) == []
