"""The copies of a load in bytes, as the copy kernels need them (pure).

Many tensors of a model are cut alike, and a rank wants the same box of them into arrays of the same
strides: what does not depend on where cells lie is computed once for all of these.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from everstep.checkpoint.layout import Box, Layout
from everstep.checkpoint.pack import dense_strides
from everstep.checkpoint.reshard import overlaps


class BoxCopy(NamedTuple):
    """Copies a box out of the data of a pack into an array."""

    pack: int
    """Number of the pack in the manifest."""
    begin: int
    """Where the first item of the box begins in the data of the pack."""
    end: int
    """Where its last item ends there."""
    strides_bytes: tuple[int, ...]
    """Of the box in the pack."""
    target_bytes: int
    """How far from the first item of the array the first item of the box goes."""
    shape: tuple[int, ...]
    """Items of the box per dim."""


def plan_copies(
    layout: Layout,
    packs: Sequence[int],
    starts: Sequence[int],
    item_bytes: int,
    wanted: Box,
    strides_bytes: tuple[int, ...],
) -> list[BoxCopy]:
    """The copies of ``reshard.plan_load``, which see, into an array of the wanted box.

    Args:
        layout: of the stored tensor.
        packs: for each cell, the pack that holds it.
        starts: for each cell, its byte offset in the data of that pack.
        item_bytes: bytes per item.
        wanted: the box to fill.
        strides_bytes: of the array.
    """
    if not wanted.size:
        return []
    return [
        BoxCopy(packs[cell], starts[cell] + begin, starts[cell] + end, strides, target_bytes, shape)
        for cell, begin, end, strides, target_bytes, shape in _within_cells(
            layout, item_bytes, wanted, strides_bytes
        )
    ]


class _Copy(NamedTuple):
    """A copy out of a cell, wherever that lies; the members of ``BoxCopy`` otherwise."""

    cell: int
    begin: int
    end: int
    strides_bytes: tuple[int, ...]
    target_bytes: int
    shape: tuple[int, ...]


@lru_cache(maxsize=256)
def _within_cells(
    layout: Layout, item_bytes: int, wanted: Box, strides_bytes: tuple[int, ...]
) -> tuple[_Copy, ...]:
    copies = []
    for cell, dense, first_item, box in overlaps(layout, wanted):
        strides = dense_strides(dense.shape, item_bytes)
        begin = first_item * item_bytes + _offset(box.relative_to(dense), strides)
        end = begin + _offset([n - 1 for n in box.shape], strides) + item_bytes
        target = _offset(box.relative_to(wanted), strides_bytes)
        copies.append(_Copy(cell, begin, end, strides, target, box.shape))
    return tuple(copies)


def _offset(index: Sequence[int], strides_bytes: Sequence[int]) -> int:
    return sum(i * s for i, s in zip(index, strides_bytes, strict=True))
