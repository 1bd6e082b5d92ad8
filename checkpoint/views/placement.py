"""Where every cell of every tensor lies in its pack file, for whole manifests at once (pure).

``Manifest.pack_indexes`` says the same one fragment at a time; a view of thousands of tensors on
many ranks has millions of cells, so here they are placed in a few array operations.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
import numpy.typing as npt

from everstep.checkpoint.layout import Grid
from everstep.checkpoint.manifest import Manifest

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CellPlaces:
    """For each cell of a tensor, in C order."""

    packs: Integers
    """Number of the pack in the manifest."""
    offsets: Integers
    """Byte offset of the cell in the file of that pack; the cell is dense there, in C order."""


def place_cells(manifest: Manifest) -> Mapping[str, CellPlaces]:
    """The places of the cells of all tensors, by name.

    Cells follow each other in a pack by item size (largest first), name, and offset; the C order of
    a grid is the order of the offsets of its cells.
    """
    ordered = sorted(manifest.tensors.values(), key=lambda t: (-t.spec.item_bytes, t.spec.name))
    packs = np.fromiter(chain.from_iterable(t.packs for t in ordered), np.int64)
    sizes = [_cell_sizes(t.grid) * t.spec.item_bytes for t in ordered]
    size_bytes = np.concatenate([*sizes, np.zeros(0, np.int64)])
    by_pack = np.argsort(packs, kind="stable")
    ends = np.cumsum(size_bytes[by_pack])
    starts = ends - size_bytes[by_pack]
    firsts = np.searchsorted(packs[by_pack], np.arange(len(manifest.packs)))
    before = np.concatenate([[0], ends])[firsts]
    data_starts = np.array([p.data_start for p in manifest.packs], np.int64)
    offsets = np.empty_like(starts)
    offsets[by_pack] = starts + (data_starts - before)[packs[by_pack]]
    places, done = {}, 0
    for tensor in ordered:
        span = slice(done, done + tensor.grid.n_cells)
        places[tensor.spec.name] = CellPlaces(packs[span], offsets[span])
        done = span.stop
    return places


@lru_cache(maxsize=4096)
def _cell_sizes(grid: Grid) -> Integers:
    return np.fromiter(grid.cell_sizes(), np.int64)
