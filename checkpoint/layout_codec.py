"""Layouts of stored tensors as compact JSON (pure)."""

import math
import reprlib
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from everstep.checkpoint.coverage import check_boxes
from everstep.checkpoint.grid_codec import (
    decode_bounds,
    decode_runs,
    encode_bounds,
)
from everstep.checkpoint.json_checks import extents
from everstep.checkpoint.layout import Box, Boxes, FlatRanges, Grid, Layout

MAX_CELLS = 2**22
"""Of all tensors of a manifest together."""
MAX_CELLS_PER_PACK = 256
"""Of one tensor, on average over all packs: what a short manifest can make a reader allocate."""
MAX_SIZE_BYTES = 2**62
"""Of all tensors together."""
_FORMS = ("grid", "boxes", "flat")


def max_cells(n_packs: int) -> int:
    """How many cells a tensor can have."""
    return MAX_CELLS_PER_PACK * n_packs


def encode_layout(layout: Layout) -> dict[str, Any]:
    """One member: the form of the layout."""
    match layout:
        case Grid():
            return {"grid": encode_bounds(layout.bounds)}
        case Boxes():
            return {"boxes": layout.boxes}
        case FlatRanges():
            return {"flat": encode_bounds([layout.bounds])[0]}
        case _:
            raise TypeError(f"{type(layout).__name__} has no JSON form")


class _Known(NamedTuple):
    shape: tuple[int, ...]
    layout: Layout
    n_cells: int
    n_items: int


class LayoutDecoder:
    """Decodes the layouts of the tensors of one manifest, of which few are different.

    Args:
        n_packs: number of packs of the manifest.
    """

    def __init__(self, n_packs: int) -> None:
        self._n_packs = n_packs
        self._layouts: dict[str, _Known] = {}
        self._packs: dict[tuple[str, int], tuple[int, ...]] = {}
        self._cells_left, self._bytes_left = MAX_CELLS, MAX_SIZE_BYTES

    def decode(
        self, coded: Mapping[str, Any], item_bytes: int
    ) -> tuple[tuple[int, ...], Layout, tuple[int, ...]]:
        """Global shape, layout, and pack of each cell of a tensor.

        Args:
            coded: what the manifest says of the tensor.
            item_bytes: bytes per item of it.

        Raises:
            KeyError: a member is missing.
            TypeError: a member is of another type.
            ValueError: it is no layout that covers such a tensor exactly once.
        """
        form = next((f for f in _FORMS if f in coded), "grid")
        # other types that compare equal, such as 1 and True, have another repr
        key = f"{coded['shape']!r} {form} {coded[form]!r}"
        known = self._layouts.get(key)
        if known is None:
            known = self._layouts[key] = self._decode_layout(form, coded[form], coded["shape"])
        shape, layout, count, n_items = known
        self._cells_left -= count
        self._bytes_left -= n_items * item_bytes
        if self._cells_left < 0 or self._bytes_left < 0:
            raise ValueError(f"its tensors have more than {MAX_CELLS} cells or too many bytes")
        packs_key = repr(coded["packs"]), count
        packs = self._packs.get(packs_key)
        if packs is None:
            packs = tuple(decode_runs(coded["packs"], count, self._n_packs))
            self._packs[packs_key] = packs
        return shape, layout, packs

    def _decode_layout(self, form: str, coded: Any, coded_shape: Any) -> _Known:
        shape, limit = extents(coded_shape), max_cells(self._n_packs)
        n_items = math.prod(shape)
        if n_items > MAX_SIZE_BYTES:
            raise ValueError(f"shape {reprlib.repr(shape)} has too many items")
        layout: Layout
        if form == "grid":
            layout = Grid(decode_bounds(coded, shape, limit))
        elif form == "flat":
            (bounds,) = decode_bounds([coded], [n_items], limit)
            layout = FlatRanges(shape, bounds)
        else:
            layout = Boxes(_decode_boxes(coded, shape, limit))
        return _Known(shape, layout, layout.n_cells, n_items)


def _decode_boxes(coded: Any, shape: tuple[int, ...], limit: int) -> tuple[Box, ...]:
    if not isinstance(coded, list) or len(coded) > limit:
        raise ValueError(f"{reprlib.repr(coded)} is no list of at most {limit} boxes")
    boxes = tuple(Box(extents(offset), extents(n)) for offset, n in coded)
    if any(not len(shape) == len(b.offset) == len(b.shape) or not b.size for b in boxes):
        raise ValueError("a box is empty, or has other dims than its tensor")
    if any(a.offset >= b.offset for a, b in pairwise(boxes)):
        raise ValueError("its boxes do not ascend")
    if math.prod(shape):
        check_boxes(shape, boxes)
    elif boxes:
        raise ValueError("an empty tensor has boxes")
    return boxes
