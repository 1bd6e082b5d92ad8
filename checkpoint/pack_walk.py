"""In which order the bytes of a pack are read when boxes are copied out of it (pure).

A pack is read once, front to back. Every block that some copy touches is checksummed, all of it,
including bytes that nobody wants, in the same pass in which its bytes are copied; blocks that
nobody touches are left alone. Addresses are those of ``extents``.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from everstep.checkpoint.extents import Extents
from everstep.checkpoint.pack import StridedBytes

WINDOW_BYTES = 8 * 2**20
"""About as many bytes are brought into memory at a time, and copied by one call."""


class PackCopy(NamedTuple):
    """A box to copy out of a pack into an array; see ``copy_plan.BoxCopy``."""

    begin: int
    """Address of the first item of the box."""
    end: int
    """Address where its last item ends; in the same extent."""
    strides_bytes: tuple[int, ...]
    """Of the box in the pack, in C order: none is negative, each spans what is inside of it."""
    shape: tuple[int, ...]
    """Items per dim; there is no 0."""
    item_bytes: int
    target: StridedBytes
    """The array to fill; writable."""
    target_bytes: int
    """How far from its first item the first item of the box goes."""

    @property
    def n_bytes(self) -> int:
        """Size of the box."""
        return math.prod(self.shape) * self.item_bytes


class Step(NamedTuple):
    """Checksum a range of addresses, which may be empty, and copy a box, if there is one.

    What the range has before the box, nobody wants; what the box has before the range, another
    step checksums, or none.
    """

    begin: int
    end: int
    copy: PackCopy | None


class Window(NamedTuple):
    """A range of the file, and the steps that read nothing else."""

    begin: int
    end: int
    steps: list[Step]


def split_copy(copy: PackCopy, limit_bytes: int = WINDOW_BYTES) -> Iterator[PackCopy]:
    """Cut a copy into parts that span at most ``limit_bytes`` of the pack (or one item)."""
    span = copy.end - copy.begin
    dim = next((d for d, n in enumerate(copy.shape) if n > 1), None)
    if span <= limit_bytes or dim is None:
        yield copy
        return
    n, stride, step = copy.shape[dim], copy.strides_bytes[dim], copy.target.strides_bytes[dim]
    inner = span - (n - 1) * stride
    count = max(1, (limit_bytes - inner) // stride + 1)
    for start in range(0, n, count):
        taken = min(count, n - start)
        begin = copy.begin + start * stride
        part = copy._replace(
            begin=begin,
            end=begin + (taken - 1) * stride + inner,
            shape=(*copy.shape[:dim], taken, *copy.shape[dim + 1 :]),
            target_bytes=copy.target_bytes + start * step,
        )
        if taken > 1:
            yield part
        else:
            yield from split_copy(part, limit_bytes)


def plan_steps(copies: Iterable[PackCopy], blocks: Extents, verified: bytearray) -> Iterator[Step]:
    """The steps of one walk: each copy once, and each touched block checksummed once, in order.

    Args:
        copies: ascending by ``begin``; they may overlap.
        blocks: of the pack.
        verified: one byte per block, not 0 for those that need no checksum. Such a block gets one
            nevertheless, of all its bytes, where a copy has others before and behind it.
    """
    size = blocks.block_bytes
    at = until = 0  # checksummed so far; where the last block that was begun ends
    for copy in copies:
        first, stop = copy.begin // size, -(-copy.end // size)
        need = verified.find(0, first, stop)
        if need < 0:
            yield Step(at, at, copy)
            continue
        stop = verified.rfind(0, first, stop) + 1
        if need * size >= until:
            if at < until:
                yield Step(at, until, None)
            at = need * size
        end = min(copy.end, stop * size)
        if end > at:
            yield Step(at, end, copy)
            at, until = end, blocks.block_end(stop - 1)
        else:
            yield Step(at, at, copy)
    if at < until:
        yield Step(at, until, None)


def plan_checks(blocks: Extents, verified: bytearray) -> Iterator[Step]:
    """Steps that checksum every block that is not verified yet."""
    size = blocks.block_bytes
    first, n = 0, max(1, WINDOW_BYTES // size)
    while (first := verified.find(0, first)) >= 0:
        stop = verified.find(1, first, first + n)
        for span in blocks.spans(first, min(first + n, len(verified)) if stop < 0 else stop):
            yield Step(span.block * size, span.block * size + span.n_bytes, None)
            first = -(-(span.block * size + span.n_bytes) // size)


def plan_windows(
    steps: Iterable[Step], blocks: Extents, limit_bytes: int = WINDOW_BYTES
) -> list[Window]:
    """Steps that read neighbouring bytes together, until these are ``limit_bytes``."""
    windows: list[Window] = []
    begin = end = 0  # of the window that is growing: its bytes in the file
    growing: list[Step] = []
    for step in steps:
        low, high = step.begin, step.end
        if step.copy is not None:
            if low == high:
                low, high = step.copy.begin, step.copy.end
            else:
                low, high = min(low, step.copy.begin), max(high, step.copy.end)
        first = blocks.file_offset(low)
        last = first + high - low
        if growing and begin <= first <= end and max(end, last) - begin <= limit_bytes:
            end = max(end, last)
            growing.append(step)
            continue
        if growing:
            windows.append(Window(begin, end, growing))
        begin, end, growing = first, last, [step]
    if growing:
        windows.append(Window(begin, end, growing))
    return windows
