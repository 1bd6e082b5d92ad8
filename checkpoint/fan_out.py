"""Read once, fan out: who fetches which window of a pack, and who gets it from whom (pure).

On an object store every byte costs a request and crosses the network; bytes that several ranks need
are fetched by one of them, which sends them on. For files it does not pay: ranks of one node share
the page cache, so that the disk is read once anyway, and a copy out of a mapping costs less than
one through a socket.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from everstep.checkpoint.ranged_plan import Blocks, Window, plan_windows

ROUND_BLOCKS = 16
"""Most blocks that a rank fetches or receives in a round; two rounds are in memory at a time."""


@dataclass(frozen=True)
class Delivery:
    """A window, the rank that fetches it, and all the ranks that need it (the reader is one)."""

    window: Window
    reader: int
    needers: tuple[int, ...]


def plan_fan_out(needs: Sequence[Mapping[int, Blocks]]) -> list[list[Delivery]]:
    """Plan the rounds in which all ranks get what they need; the same answer on every rank.

    Args:
        needs: for each rank, the blocks that it needs, by pack.

    Returns:
        Rounds of deliveries; windows ascend over all rounds. Every block that some rank needs is
        fetched exactly once, by the one of its needers that has fetched the least so far.
    """
    fetched_blocks = [0] * len(needs)
    rounds: list[list[Delivery]] = []
    load: dict[int, int] = {}
    for pack in sorted({pack for blocks in needs for pack in blocks}):
        union = np.logical_or.reduce([blocks[pack] for blocks in needs if pack in blocks])
        for window in plan_windows(pack, union):
            needers = tuple(
                rank
                for rank, blocks in enumerate(needs)
                if pack in blocks and blocks[pack][window.begin : window.end].any()
            )
            reader = min(needers, key=lambda rank: (fetched_blocks[rank], rank))
            size = window.end - window.begin
            fetched_blocks[reader] += size
            if not rounds or any(load.get(r, 0) + size > ROUND_BLOCKS for r in needers):
                rounds.append([])
                load = {}
            rounds[-1].append(Delivery(window, reader, needers))
            for rank in needers:
                load[rank] = load.get(rank, 0) + size
    return rounds
