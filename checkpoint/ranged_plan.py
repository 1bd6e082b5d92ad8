"""Which byte ranges of packs to fetch from an object store, and in which order (pure).

Everything is in whole blocks, since those are what checksums vouch for. Needed blocks that lie
close together are fetched as one *window*; a large range is cut into several, so that a few of
them fit into a small memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from everstep.checkpoint.layout import Box
from everstep.checkpoint.pack import dense_strides

WINDOW_BLOCKS = 4
"""Largest window; with blocks of 1 MiB, a request of 4 MiB."""
GAP_BLOCKS = 2
"""A gap of so many blocks that nobody needs is fetched, too: one more request costs more."""

Blocks = NDArray[np.bool_]


@dataclass(frozen=True, order=True)
class Piece:
    """A box to copy whose bytes lie close together in a pack."""

    begin: int
    """Its first byte in the data of the pack."""
    end: int
    request: int
    """Number of the request that it is a part of."""
    cell: Box
    """The stored fragment."""
    box: Box
    """The part of it to copy."""


@dataclass(frozen=True, order=True)
class Window:
    """Blocks ``[begin, end)`` of a pack, fetched at once."""

    pack: int
    begin: int
    end: int


def split_box(cell: Box, box: Box, item_bytes: int, limit_bytes: int) -> Iterator[Box]:
    """Cut a box of a dense cell into parts that span at most ``limit_bytes`` of it (or one item).

    Args:
        cell: the stored fragment, dense in C order.
        box: what is wanted of it, not empty.
        item_bytes: bytes per item.
        limit_bytes: from the first to the last byte of a part.
    """
    strides = dense_strides(cell.shape, item_bytes)

    def cut(part: Box, dim: int) -> Iterator[Box]:
        inner = item_bytes + sum((n - 1) * s for n, s in zip(part.shape, strides, strict=True))
        if inner <= limit_bytes or dim == len(part.shape):
            yield part
            return
        inner -= (part.shape[dim] - 1) * strides[dim]
        count = max(1, (limit_bytes - inner) // strides[dim] + 1) if inner <= limit_bytes else 1
        begin, n = part.offset[dim], part.shape[dim]
        for start in range(begin, begin + n, count):
            offset = (*part.offset[:dim], start, *part.offset[dim + 1 :])
            width = min(count, begin + n - start)
            yield from cut(Box(offset, (*part.shape[:dim], width, *part.shape[dim + 1 :])), dim + 1)

    yield from cut(box, 0)


def pieces_of(
    request: int, start: int, cell: Box, box: Box, item_bytes: int, limit_bytes: int
) -> list[Piece]:
    """The pieces of a box of a fragment that begins at byte ``start`` of the data of its pack."""
    strides = dense_strides(cell.shape, item_bytes)
    found = []
    for part in split_box(cell, box, item_bytes, limit_bytes):
        inside = part.relative_to(cell)
        begin = start + sum(i * s for i, s in zip(inside, strides, strict=True))
        span = item_bytes + sum((n - 1) * s for n, s in zip(part.shape, strides, strict=True))
        found.append(Piece(begin, begin + span, request, cell, part))
    return found


def needed_blocks(pieces: Sequence[Piece], data_bytes: int, block_bytes: int) -> Blocks:
    """For each block of a pack, whether some piece touches it."""
    needed = np.zeros(-(-data_bytes // block_bytes), np.bool_)
    for piece in pieces:
        needed[piece.begin // block_bytes : -(-piece.end // block_bytes)] = True
    return needed


def plan_windows(pack: int, needed: Blocks) -> list[Window]:
    """The windows that fetch every needed block exactly once, in ascending order."""
    windows: list[Window] = []
    runs: list[list[int]] = []
    for block in np.flatnonzero(needed).tolist():
        if runs and block - runs[-1][1] <= GAP_BLOCKS:
            runs[-1][1] = block + 1
        else:
            runs.append([block, block + 1])
    for begin, end in runs:
        cuts = range(begin, end, WINDOW_BLOCKS)
        windows += [Window(pack, cut, min(cut + WINDOW_BLOCKS, end)) for cut in cuts]
    return windows
