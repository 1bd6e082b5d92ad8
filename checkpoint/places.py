"""Where every cell of every stored tensor lies in its pack, for whole manifests at once (pure).

Cells follow each other in a pack by item size (largest first), name, and offset; all of it follows
from the manifest, so no header of a pack has to be read. Many tensors on many ranks have millions
of cells: these are placed in a few array operations.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from everstep.checkpoint.layout import Integers, Layout, TensorSpec


@dataclass(frozen=True)
class Places:
    """The places of all cells of a manifest."""

    held_bytes: Sequence[int]
    """For each pack, the bytes of the cells in it."""
    _starts: Integers
    _spans: Mapping[str, tuple[int, int]]
    _dense: Integers
    """What the starts are where cells follow each other in all packs."""
    _by_pack: Integers
    """Numbers of all cells, ordered by their packs, and by their order in these."""
    _edges: Integers
    """For each pack where it begins there, and the end."""
    _tensor_ends: Integers
    _item_bytes: Integers
    """Of each tensor, in the order of the cells."""

    def starts(self, name: str) -> list[int]:
        """For each cell of a tensor, its byte offset in the data of its pack.

        Raises:
            KeyError: there is no such tensor.
        """
        begin, end = self._spans[name]
        starts: list[int] = self._starts[begin:end].tolist()
        return starts

    def sizes(self, pack: int) -> Integers:
        """Bytes of each cell of a pack in its order there, and bytes per item: shape [cells, 2]."""
        cells = self._by_pack[self._edges[pack] : self._edges[pack + 1]]
        n_bytes = np.diff(self._dense[cells], append=self.held_bytes[pack])
        tensors = np.searchsorted(self._tensor_ends, cells, side="right")
        return np.column_stack([n_bytes, self._item_bytes[tensors]])

    def moved(self, starts: Mapping[int, Sequence[int]]) -> "Places":
        """The same with other starts, for some packs: of each of their cells, in its order there.

        Raises:
            ValueError: there are more or fewer cells.
        """
        if not starts:
            return self
        moved = self._starts.copy()
        for pack, values in starts.items():
            cells = self._by_pack[self._edges[pack] : self._edges[pack + 1]]
            moved[cells] = np.array(values, np.int64)
        return replace(self, _starts=moved)


def place(stored: Iterable[tuple[TensorSpec, Layout, Sequence[int]]], n_packs: int) -> Places:
    """The places of the cells of all tensors, which have less than 2**63 bytes together.

    Args:
        stored: for each tensor its layout and, for each cell of it, the number of its pack.
        n_packs: number of packs.
    """
    ordered = sorted(stored, key=lambda t: (-t[0].item_bytes, t[0].name))
    counts = [len(packs) for _, _, packs in ordered]
    pack_of = np.fromiter(chain.from_iterable(p for _, _, p in ordered), np.int64, sum(counts))
    items = [layout.cell_sizes() for _, layout, _ in ordered]
    item_bytes = np.repeat(np.array([s.item_bytes for s, _, _ in ordered], np.int64), counts)
    size_bytes = np.concatenate([np.zeros(0, np.int64), *items]) * item_bytes
    # a stable sort of 16-bit numbers takes linear time
    by_pack = np.argsort(pack_of.astype(np.uint16) if n_packs < 2**16 else pack_of, kind="stable")
    ends = np.cumsum(size_bytes[by_pack])
    edges = np.searchsorted(pack_of[by_pack], np.arange(n_packs + 1))
    before = np.concatenate([np.zeros(1, np.int64), ends])[edges]
    starts = np.empty_like(size_bytes)
    starts[by_pack] = ends - size_bytes[by_pack] - before[pack_of[by_pack]]
    last = np.cumsum([0, *counts]).tolist()
    spans = {spec.name: (last[i], last[i + 1]) for i, (spec, _, _) in enumerate(ordered)}
    return Places(
        np.diff(before).tolist(),
        starts,
        spans,
        starts,
        by_pack,
        edges,
        np.array(last[1:], np.int64),
        np.array([s.item_bytes for s, _, _ in ordered], np.int64),
    )
