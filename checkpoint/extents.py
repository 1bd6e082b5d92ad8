"""Where the checksummed blocks of a pack lie in its file (pure).

A pack consists of *extents*: one run of bytes that holds all cells, or one for each cell, anywhere
in the file. Each extent is cut into blocks of its own, the last of which may be short, so that none
has bytes of two extents. Blocks are numbered through, and byte ``i`` of block ``k`` has the address
``k * block_bytes + i``: whoever plans with addresses needs no other notion of where bytes are.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

Extent = tuple[int, int]
"""Byte offset in the file, and bytes."""


class Span(NamedTuple):
    """Blocks that follow each other in one extent."""

    block: int
    """Number of the first."""
    offset: int
    """Of its first byte in the file."""
    n_bytes: int


class Extents:
    """The extents of a pack.

    Args:
        extents: in the order of their blocks; none is empty.
        block_bytes: size of every block but the last of each extent.
    """

    def __init__(self, extents: Sequence[Extent], block_bytes: int) -> None:
        self._extents, self.block_bytes = extents, block_bytes
        self._first = [0, *accumulate(-(-n // block_bytes) for _, n in extents)]

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return self._first[-1]

    @property
    def starts(self) -> list[int]:
        """The address of the first byte of each extent."""
        return [block * self.block_bytes for block in self._first[:-1]]

    @property
    def end(self) -> int:
        """The address after the last byte; 0 where there are no extents."""
        return self._first[-2] * self.block_bytes + self._extents[-1][1] if self._extents else 0

    def file_offset(self, address: int) -> int:
        """Byte offset in the file of the byte with an address."""
        number = self._at(address // self.block_bytes)
        return self._extents[number][0] + address - self._first[number] * self.block_bytes

    def block_end(self, block: int) -> int:
        """The address after the last byte of a block."""
        number = self._at(block)
        end = self._first[number] * self.block_bytes + self._extents[number][1]
        return min((block + 1) * self.block_bytes, end)

    def spans(self, first: int, stop: int) -> Iterator[Span]:
        """The blocks from ``first`` to before ``stop``, by extent."""
        while first < stop:
            number = self._at(first)
            until = min(stop, self._first[number + 1])
            offset, n_bytes = self._extents[number]
            begin = (first - self._first[number]) * self.block_bytes
            end = min((until - self._first[number]) * self.block_bytes, n_bytes)
            yield Span(first, offset + begin, end - begin)
            first = until

    def _at(self, block: int) -> int:
        """Number of the extent that a block is in."""
        return bisect_right(self._first, block) - 1


def check_extents(extents: Sequence[Extent], item_bytes: Sequence[int], file_bytes: int) -> None:
    """Extents are inside of their file, aligned to their items, and apart from one another.

    Args:
        extents: in any order, less than 2**62 bytes together, at offsets below 2**62.
        item_bytes: for each the bytes per item of what it holds.
        file_bytes: size of the file.

    Raises:
        ValueError: they are not.
    """
    placed = np.array(extents, np.int64).reshape(-1, 2)
    placed = np.column_stack([placed, np.array(item_bytes, np.int64)])
    placed = placed[np.argsort(placed[:, 0], kind="stable")]
    begins, sizes, items = placed.T
    ends = begins + sizes
    for wrong, problem in (
        (begins % items != 0, "is not aligned to its items"),
        (ends > file_bytes, f"leaves its file of {file_bytes} bytes"),
        (np.append(ends[:-1] > begins[1:], [False] * (len(begins) > 0)), "overlaps the next one"),
    ):
        if wrong.any():
            at = int(np.argmax(wrong))
            raise ValueError(f"the extent of {sizes[at]} bytes at byte {begins[at]} {problem}")
