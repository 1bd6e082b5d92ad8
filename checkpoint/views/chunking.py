"""Finds a regular grid of chunks in the cells of a tensor, if there is one (pure).

Zarr's chunks all have one shape, and each is one run of bytes. A cell that a rank stored is dense
and in C order, so a piece of it is one run of bytes exactly if it spans the cell in every dim after
some dim d, and a single item in every dim before d. So the chunks are chosen by d: one item long
before it, as long as the cells after it (which must then all have one length), and along d as long
as divides every boundary between cells.

Chunks at the far edge must have as many bytes as all others. Where the last one along d is short,
its bytes come first and whatever follows in the file makes it full: readers drop what lies outside
of the tensor. (But TensorStore looks at all values of a chunk where not all bits are values.)
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from everstep.checkpoint.layout import Grid, Integers, TensorSpec

MOST_CHUNKS_PER_CELL = 4
FEW_CHUNKS = 256
"""As many chunks are always fine, however few cells there are."""
CHECKED_DTYPES = frozenset({"BOOL"})
"""Chunks of these must not contain bytes of anything else."""


@dataclass(frozen=True)
class CellPlaces:
    """For each cell of a tensor, in order."""

    packs: Integers
    """Number of the pack in the manifest."""
    offsets: Integers
    """Byte offset of the cell in the file of that pack; the cell is dense there, in C order."""


@dataclass(frozen=True)
class Chunking:
    """A regular grid of chunks over a tensor, each chunk inside of one cell."""

    chunk_shape: tuple[int, ...]
    counts: tuple[int, ...]
    """Number of chunks along each dim."""
    cells: Integers
    """For each chunk in C order the cell that it lies in, by its number in C order."""
    item_offsets: Integers
    """For each chunk in C order its first item, counted from the first item of the cell."""


def regular_chunking(
    grid: Grid, places: CellPlaces, spec: TensorSpec, file_sizes: Integers
) -> tuple[Chunking, Integers] | None:
    """The coarsest regular grid of chunks whose bytes are all there.

    Args:
        grid: the cells of a tensor.
        places: where they lie.
        spec: the tensor.
        file_sizes: bytes of each pack file.

    Returns:
        The chunks and the byte offset of each in its file; None where none would do with at most
        ``MOST_CHUNKS_PER_CELL`` chunks per cell.
    """
    for chunking in candidates(grid):
        short = any(n % k for n, k in zip(spec.shape, chunking.chunk_shape, strict=True))
        if short and spec.dtype in CHECKED_DTYPES:
            continue
        offsets = places.offsets[chunking.cells] + chunking.item_offsets * spec.item_bytes
        ends = offsets + math.prod(chunking.chunk_shape) * spec.item_bytes
        if (ends <= file_sizes[places.packs[chunking.cells]]).all():
            return chunking, offsets
    return None


@lru_cache(maxsize=64)
def candidates(grid: Grid) -> tuple[Chunking, ...]:
    """Every regular grid of chunks that is not too fine, the coarsest first."""
    shape = tuple(b[-1] for b in grid.bounds)
    most = max(FEW_CHUNKS, MOST_CHUNKS_PER_CELL * grid.n_cells)
    found: list[tuple[int, ...]] = []
    for dim in range(len(shape)):
        tail = tuple(b[1] if len(b) > 1 else 1 for b in grid.bounds[dim + 1 :])
        if any(
            hi - lo != width
            for b, width in zip(grid.bounds[dim + 1 :], tail, strict=True)
            for lo, hi in pairwise(b)
        ):
            continue
        whole = math.gcd(*grid.bounds[dim][:-1]) or max(1, shape[dim])
        lengths = (whole, math.gcd(whole, shape[dim]) or 1)
        found += [(*(1 for _ in shape[:dim]), length, *tail) for length in lengths]
    counted = {c: tuple(-(-n // k) for n, k in zip(shape, c, strict=True)) for c in found or [()]}
    chosen = sorted((math.prod(n), c) for c, n in counted.items() if math.prod(n) <= most)
    return tuple(_chunking(grid, c, counted[c]) for _, c in chosen)


def _chunking(grid: Grid, chunk_shape: tuple[int, ...], counts: tuple[int, ...]) -> Chunking:
    """Finds for each chunk its cell and its place in the cell, for all dims by Horner's rule."""
    cells = items = np.zeros((), np.int64)
    for bounds, length, count in zip(grid.bounds, chunk_shape, counts, strict=True):
        edges = np.array(bounds, np.int64)
        begins = np.arange(count) * length
        index = np.searchsorted(edges, begins, side="right") - 1
        widths = edges[index + 1] - edges[index]
        cells = cells[..., None] * (len(bounds) - 1) + index
        items = items[..., None] * widths + (begins - edges[index])
    return Chunking(chunk_shape, counts, cells.reshape(-1), items.reshape(-1))
