"""Boxes of logical tensors: the plain data that saving and loading are planned with (pure).

A *box* is a hyper-rectangle of a logical tensor; a *fragment* is what some rank holds: a box, or a
*flat range* [a, b) of the tensor flattened in C order, as ZeRO partitions are. The fragments of one
tensor, over all ranks and without replicas, form its *layout*, one of

- ``Grid``: per tensor dim a list of boundaries, each cell held somewhere (FSDP2, HSDP and tensor
  parallelism produce grids, though not always regular ones: see ``torch_layout.intervals``);
- ``Boxes``: any boxes that tile the tensor;
- ``FlatRanges``: boundaries in the flattened tensor.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "F8_E8M0": 1, "F4_X2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "C128": 16, "C64": 8, "C32": 4,
}  # fmt: skip
"""Bytes per item of each dtype; the names are those of safetensors where that has one."""

RNG_PREFIX = "rng."
"""Names of tensors that mean something on the mesh they were saved on, and on no other."""
Integers = npt.NDArray[np.int64]


class Box(NamedTuple):
    """A hyper-rectangle: ``offset`` and ``shape`` have one entry per tensor dim (none for 0-d)."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of items."""
        return math.prod(self.shape)

    def intersect(self, other: "Box") -> "Box | None":
        """The common box, or None where the two share no item."""
        offset = tuple(map(max, self.offset, other.offset))
        shape = tuple(
            min(a + m, b + n) - o
            for a, m, b, n, o in zip(
                self.offset, self.shape, other.offset, other.shape, offset, strict=True
            )
        )
        return Box(offset, shape) if all(n > 0 for n in shape) else None

    def relative_to(self, outer: "Box") -> tuple[int, ...]:
        """Offset of this box inside ``outer``."""
        return tuple(a - b for a, b in zip(self.offset, outer.offset, strict=True))


@dataclass(frozen=True, order=True)
class TensorSpec:
    """A logical tensor: its name, dtype (a key of ``ITEM_BYTES``) and global shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Bytes per item."""
        return ITEM_BYTES[self.dtype]

    @property
    def whole(self) -> Box:
        """The box of the whole tensor."""
        return Box((0,) * len(self.shape), self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.item_bytes


class Fragment(NamedTuple):
    """A part of a logical tensor that some rank holds, densely stored."""

    spec: TensorSpec
    box: Box
    flat: bool = False
    """True: ``box`` is a range of the tensor flattened in C order, and so has one dim."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the fragment, dense."""
        return self.box.size * self.spec.item_bytes

    @property
    def key(self) -> str:
        """Name of the fragment inside a pack: the tensor's, with what it is of it if a part."""
        if self.box == self.spec.whole:
            return self.spec.name
        ranges = ",".join(
            f"{o}:{o + n}" for o, n in zip(self.box.offset, self.box.shape, strict=True)
        )
        return f"{self.spec.name}[{'flat ' if self.flat else ''}{ranges}]"


def flat_index(shape: Sequence[int], index: Sequence[int]) -> int:
    """Place of an item in the tensor of a shape flattened in C order."""
    place = 0
    for n, i in zip(shape, index, strict=True):
        place = place * n + i
    return place


def flat_boxes(shape: tuple[int, ...], begin: int, end: int) -> Iterator[Box]:
    """The boxes that a flat range [begin, end) consists of, in order: at most ``2 * ndim - 1``.

    Each is a flat range itself: it lies in the flattened tensor without gaps.
    """
    if begin >= end:
        return
    if not shape:
        yield Box((), ())
        return
    inner = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(begin, inner), divmod(end, inner)
    if first == last:
        yield from _in_row(first, flat_boxes(shape[1:], head, tail))
        return
    if head:
        yield from _in_row(first, flat_boxes(shape[1:], head, inner))
        first += 1
    if first < last:
        yield Box((first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]))
    if tail:
        yield from _in_row(last, flat_boxes(shape[1:], 0, tail))


def _in_row(row: int, boxes: Iterator[Box]) -> Iterator[Box]:
    return (Box((row, *box.offset), (1, *box.shape)) for box in boxes)


class Piece(NamedTuple):
    """Items of a wanted box that one cell of a layout holds."""

    cell: int
    """Number of the cell."""
    dense: Box
    """A box of the tensor that lies densely in the cell ..."""
    first_item: int
    """... from this item of the cell on."""
    box: Box
    """The wanted items of it; not empty."""


class Layout(Protocol):
    """How a stored tensor is cut into cells, each item being in exactly one of them."""

    def __hash__(self) -> int: ...

    @property
    def flat(self) -> bool:
        """Whether cells are ranges of the flattened tensor: see ``Fragment.flat``."""
        ...

    @property
    def n_cells(self) -> int:
        """Number of cells; none of them is empty."""
        ...

    def cells(self) -> Iterator[Box]:
        """All cells, by offset."""
        ...

    def cell_sizes(self) -> Integers:
        """Number of items of each cell, in the same order."""
        ...

    def overlapping(self, wanted: Box) -> Iterator[Piece]:
        """What to copy to fill a box of the tensor, of size > 0: each item of it once."""
        ...


@dataclass(frozen=True)
class Grid:
    """Boundaries per tensor dim: ``bounds[d]`` starts with 0, ascends, and ends with the extent."""

    bounds: tuple[tuple[int, ...], ...]

    flat = False

    @property
    def cells_per_dim(self) -> tuple[int, ...]:
        """Number of cells along each dim."""
        return tuple(len(b) - 1 for b in self.bounds)

    @property
    def n_cells(self) -> int:
        """Number of cells; 1 for a 0-d tensor, 0 for an empty one."""
        return math.prod(self.cells_per_dim)

    def cell(self, index: Sequence[int]) -> Box:
        """The box of the cell at an index per dim."""
        return Box(
            tuple(b[i] for b, i in zip(self.bounds, index, strict=True)),
            tuple(b[i + 1] - b[i] for b, i in zip(self.bounds, index, strict=True)),
        )

    def cells(self) -> Iterator[Box]:
        """All cells in C order."""
        return (self.cell(index) for index in product(*map(range, self.cells_per_dim)))

    def cell_sizes(self) -> Integers:
        """Number of items of each cell, in C order."""
        return self._sizes

    def overlapping(self, wanted: Box) -> Iterator[Piece]:
        """What to copy to fill a box of size > 0."""
        ranges = [
            range(bisect_right(b, o) - 1, bisect_right(b, o + n - 1))
            for b, o, n in zip(self.bounds, wanted.offset, wanted.shape, strict=True)
        ]
        counts = self.cells_per_dim
        for index in product(*ranges):
            cell = self.cell(index)
            common = cell.intersect(wanted)
            if common is not None:
                yield Piece(flat_index(counts, index), cell, 0, common)

    @cached_property
    def _sizes(self) -> Integers:
        sizes = np.ones(1, np.int64)
        for b in self.bounds:
            sizes = np.multiply.outer(sizes, np.diff(np.array(b, np.int64))).reshape(-1)
        return sizes


@dataclass(frozen=True)
class Boxes:
    """A list of boxes, ascending by offset, that tile a tensor: see ``coverage``."""

    boxes: tuple[Box, ...]

    flat = False

    @property
    def n_cells(self) -> int:
        """Number of boxes."""
        return len(self.boxes)

    def cells(self) -> Iterator[Box]:
        """The boxes."""
        return iter(self.boxes)

    def cell_sizes(self) -> Integers:
        """Number of items of each box."""
        begins, ends = self._ranges
        sizes: Integers = np.prod(ends - begins, axis=1, dtype=np.int64)
        return sizes

    def overlapping(self, wanted: Box) -> Iterator[Piece]:
        """What to copy to fill a box of size > 0."""
        begins, ends = self._ranges
        begin = np.array(wanted.offset, np.int64)
        end = begin + np.array(wanted.shape, np.int64)
        for number in np.flatnonzero(((begins < end) & (begin < ends)).all(axis=1)).tolist():
            common = self.boxes[number].intersect(wanted)
            if common is not None:
                yield Piece(number, self.boxes[number], 0, common)

    @cached_property
    def _ranges(self) -> tuple[Integers, Integers]:
        dims = len(self.boxes[0].offset) if self.boxes else 0
        begins = np.array([b.offset for b in self.boxes], np.int64).reshape(-1, dims)
        shapes = np.array([b.shape for b in self.boxes], np.int64).reshape(-1, dims)
        return begins, begins + shapes


@dataclass(frozen=True)
class FlatRanges:
    """Boundaries in the flattened tensor: ``bounds`` starts with 0, ascends, ends with its size."""

    shape: tuple[int, ...]
    bounds: tuple[int, ...]

    flat = True

    @property
    def n_cells(self) -> int:
        """Number of ranges."""
        return len(self.bounds) - 1

    def cells(self) -> Iterator[Box]:
        """The ranges, as boxes of the flattened tensor."""
        return (Box((lo,), (hi - lo,)) for lo, hi in pairwise(self.bounds))

    def cell_sizes(self) -> Integers:
        """Number of items of each range."""
        bounds = np.array(self.bounds, np.int64)
        return bounds[1:] - bounds[:-1]

    def overlapping(self, wanted: Box) -> Iterator[Piece]:
        """What to copy to fill a box of size > 0."""
        first = flat_index(self.shape, wanted.offset)
        stop = 1 + flat_index(
            self.shape, [o + n - 1 for o, n in zip(wanted.offset, wanted.shape, strict=True)]
        )
        number = bisect_right(self.bounds, first) - 1
        while number < self.n_cells and self.bounds[number] < stop:
            lo, hi = self.bounds[number], self.bounds[number + 1]
            for dense in flat_boxes(self.shape, max(lo, first), min(hi, stop)):
                common = dense.intersect(wanted)
                if common is not None:
                    yield Piece(number, dense, flat_index(self.shape, dense.offset) - lo, common)
            number += 1
