"""Who writes what, and which bytes fill a wanted box (pure)."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from everstep.checkpoint.coverage import holdings
from everstep.checkpoint.layout import Box, Fragment, Integers, Layout, Piece


def plan_save(
    layouts: Sequence[Sequence[Fragment]], nodes: Sequence[int] | None = None
) -> list[list[Fragment]]:
    """Choose one writer for each fragment.

    Args:
        layouts: for each rank, the non-empty fragments that it holds.
        nodes: for each rank, the number of the node that it runs on; None: one node each.

    Returns:
        For each rank the fragments that it writes. Each distinct fragment appears exactly once;
        replicated ones go, largest first, to the holder for whom the slower of two is fastest: the
        rank, with the bytes that it has so far, and its node, which is taken to be as fast as the
        most ranks that any node has. The answer depends on the arguments only, so every rank
        computes the same one.

    Raises:
        LayoutError: ranks disagree about a tensor's dtype or shape, or what they hold of it neither
            is the same nor fits together.
    """
    own_bytes = [0] * len(layouts)
    owned: list[list[Fragment]] = [[] for _ in layouts]
    shared: list[tuple[Fragment, tuple[int, ...]]] = []
    for spec, fragments, holding in holdings(layouts):
        item_bytes = spec.item_bytes
        for number, ranks, n_items in holding.shares:
            if len(ranks) == 1:
                owned[ranks[0]].append(fragments[number])
                own_bytes[ranks[0]] += n_items * item_bytes
            else:
                shared.append((fragments[number], ranks))
    load = _Load(own_bytes, nodes or range(len(layouts)))
    for fragment, choice in sorted(shared, key=lambda s: (-s[0].size_bytes, s)):
        owner = load.least(choice)
        owned[owner].append(fragment)
        load.add(owner, fragment.size_bytes)
    return owned


class _Load:
    """Bytes that ranks and nodes have been given to write."""

    def __init__(self, of_rank: Sequence[int], nodes: Sequence[int]) -> None:
        numbers, self._node_of = np.unique(np.array(nodes, np.int64), return_inverse=True)
        self._of_rank = np.array(of_rank, np.int64)
        self._of_node = np.zeros(len(numbers), np.int64)
        np.add.at(self._of_node, self._node_of, self._of_rank)
        self._width = int(np.bincount(self._node_of).max(initial=1))
        self._index = lru_cache(maxsize=4096)(_as_array)

    def add(self, rank: int, size_bytes: int) -> None:
        self._of_rank[rank] += size_bytes
        self._of_node[self._node_of[rank]] += size_bytes

    def least(self, holders: tuple[int, ...]) -> int:
        """Of these ranks the one to give more; the first of equals."""
        ranks = self._index(holders)
        of_rank = self._of_rank[ranks]
        slowest = np.maximum(of_rank * self._width, self._of_node[self._node_of[ranks]])
        equal = np.flatnonzero(slowest == slowest.min())
        return int(ranks[equal[of_rank[equal].argmin()]])


def _as_array(holders: tuple[int, ...]) -> Integers:
    return np.array(holders, np.int64)


class CopyStep(NamedTuple):
    """Fill ``box`` of a tensor out of a pack."""

    pack: int
    """Number of the pack in the manifest."""
    start: int
    """Byte offset in the pack's data from where ``cell`` lies there, densely."""
    cell: Box
    """The fragment, or as much of a flat range as is a box; contains ``box``."""
    box: Box


def plan_load(
    layout: Layout, packs: Sequence[int], starts: Sequence[int], item_bytes: int, wanted: Box
) -> list[CopyStep]:
    """The copies that fill a wanted box of a tensor, each item exactly once.

    Args:
        layout: of the stored tensor.
        packs: for each cell, the pack that holds it.
        starts: for each cell, its byte offset in the data of that pack.
        item_bytes: bytes per item.
        wanted: the box to fill; an empty one needs no copy. A flat range is filled box by box: see
            ``layout.flat_boxes``.
    """
    if not wanted.size:
        return []
    return [
        CopyStep(packs[cell], starts[cell] + first_item * item_bytes, dense, box)
        for cell, dense, first_item, box in overlaps(layout, wanted)
    ]


@lru_cache(maxsize=256)
def overlaps(layout: Layout, wanted: Box) -> tuple[Piece, ...]:
    """The tensors of a model have few different layouts, and a rank wants few boxes of them."""
    return tuple(layout.overlapping(wanted))


def layout_differences(
    wanted: Mapping[str, tuple[str, tuple[int, ...]]],
    stored: Mapping[str, tuple[str, tuple[int, ...]]],
) -> list[str]:
    """What keeps a checkpoint from being loaded: one phrase for each tensor that does not match.

    Both arguments map logical names to (dtype, global shape).
    """
    found = [
        f"tensor {n!r} is not in the checkpoint" for n in sorted(wanted.keys() - stored.keys())
    ]
    found += [
        f"the checkpoint's tensor {n!r} is not in this run"
        for n in sorted(stored.keys() - wanted.keys())
    ]
    for name in sorted(wanted.keys() & stored.keys()):
        if wanted[name] != stored[name]:
            found.append(
                f"tensor {name!r} is {stored[name][0]} {list(stored[name][1])} in the checkpoint "
                f"and {wanted[name][0]} {list(wanted[name][1])} in this run"
            )
    return found


def mark_held(held: Collection[str], stored: Collection[str]) -> str:
    """Which of the ``stored`` names a rank holds: a bit set in hex, small enough to exchange."""
    return f"{sum(1 << index for index, name in enumerate(sorted(stored)) if name in held):x}"


def held_nowhere(stored: Collection[str], marks: Iterable[str]) -> set[str]:
    """The ``stored`` names that no rank holds, given every rank's ``mark_held`` of the same."""
    held = 0
    for mark in marks:
        held |= int(mark, 16)
    return {name for index, name in enumerate(sorted(stored)) if not held >> index & 1}
