"""Boxes of logical tensors: the plain data that saving and loading are planned with (pure).

A *box* is a hyper-rectangle of a logical tensor; a *fragment* is a box that some rank holds. The
boxes of one tensor, over all ranks and without replicas, form a *grid*: per tensor dim a list of
boundaries, each cell held somewhere. (FSDP2, HSDP and tensor parallelism produce grids, though not
always regular ones: see ``torch_state.intervals``.)
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product

from everstep.checkpoint.errors import LayoutError

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes per item of each dtype; the names are those of safetensors."""


@dataclass(frozen=True, order=True)
class Box:
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
        return self.whole.size * self.item_bytes


@dataclass(frozen=True, order=True)
class Fragment:
    """A box of a logical tensor that some rank holds."""

    spec: TensorSpec
    box: Box

    @property
    def size_bytes(self) -> int:
        """Bytes of the fragment, dense."""
        return self.box.size * self.spec.item_bytes

    @property
    def key(self) -> str:
        """Name of the fragment inside a pack: the tensor's, with the box where it is a part."""
        if self.box == self.spec.whole:
            return self.spec.name
        ranges = ",".join(
            f"{o}:{o + n}" for o, n in zip(self.box.offset, self.box.shape, strict=True)
        )
        return f"{self.spec.name}[{ranges}]"


@dataclass(frozen=True)
class Grid:
    """Boundaries per tensor dim: ``bounds[d]`` starts with 0, ascends, and ends with the extent."""

    bounds: tuple[tuple[int, ...], ...]

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

    def cell_sizes(self) -> Iterator[int]:
        """Number of items of each cell, in C order."""
        widths = [[hi - lo for lo, hi in pairwise(b)] for b in self.bounds]
        return map(math.prod, product(*widths))

    def overlapping(self, box: Box) -> Iterator[tuple[int, Box]]:
        """(index in C order, cell) of every cell that shares items with a box of size > 0."""
        ranges = [
            range(bisect_right(b, o) - 1, bisect_right(b, o + n - 1))
            for b, o, n in zip(self.bounds, box.offset, box.shape, strict=True)
        ]
        strides = self._strides
        for index in product(*ranges):
            yield sum(i * s for i, s in zip(index, strides, strict=True)), self.cell(index)

    @cached_property
    def _strides(self) -> tuple[int, ...]:
        counts = self.cells_per_dim
        return tuple(math.prod(counts[d + 1 :]) for d in range(len(counts)))


def grid_of(spec: TensorSpec, boxes: Iterable[Box]) -> Grid:
    """The grid that boxes form; empty ones do not count (an empty tensor has no others).

    Raises:
        LayoutError: the boxes leave a hole, overlap, or do not line up as a grid.
    """
    found = {box for box in boxes if box.size}
    if not spec.size_bytes or found == {spec.whole}:
        return Grid(tuple((0, n) if n else (0,) for n in spec.shape))
    starts: list[set[int]] = [set() for _ in spec.shape]
    for box in found:
        for dim, offset in enumerate(box.offset):
            starts[dim].add(offset)
    grid = Grid(tuple((*sorted(s), n) for s, n in zip(starts, spec.shape, strict=True)))
    bounds = grid.bounds
    if any(b[0] != 0 for b in bounds) or grid.n_cells != len(found) or set(grid.cells()) != found:
        raise LayoutError(
            f"tensor {spec.name!r} of shape {spec.shape} is held as boxes that do not form a grid "
            f"covering it exactly once: {sorted(found)[:4]}"
        )
    return grid
