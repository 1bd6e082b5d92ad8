"""A checkpoint as a Zarr group: its arrays, their chunks, and where the chunks lie (pure).

The root has one member for each tensor, under the tensor's logical name: an array, where the cells
can be cut into a regular grid of chunks. Where they cannot, a group with one array for each shape
of cell, ``3x2`` for cells of 3 by 2; its first dim counts the cells, and its attribute
``everstep_offsets`` says where in the tensor each belongs (a flat range counts as the boxes that it
consists of). So every tensor is there, and none is there wrongly.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from everstep.checkpoint.layout import (
    Box,
    FlatRanges,
    Grid,
    Integers,
    Layout,
    flat_boxes,
    flat_index,
)
from everstep.checkpoint.manifest import Manifest, StoredTensor
from everstep.checkpoint.views.chunking import CellPlaces, regular_chunking
from everstep.checkpoint.views.zarr_metadata import (
    ZarrType,
    array_metadata,
    group_metadata,
    node_name,
    zarr_type,
)


@dataclass(frozen=True)
class ArrayNode:
    """An array of the view."""

    path: str
    """Below the root, without leading or trailing slash."""
    metadata: Mapping[str, Any]
    counts: tuple[int, ...]
    """Number of chunks along each dim."""
    packs: Integers
    """For each chunk in C order the number of the pack in the manifest."""
    offsets: Integers
    """For each chunk in C order its byte offset in the file of the pack."""
    chunk_bytes: int


@dataclass(frozen=True)
class GroupNode:
    """The root (its path is empty), or a tensor of several arrays, which are nodes of their own."""

    path: str
    metadata: Mapping[str, Any]


def root_node(step: int, generation: int) -> GroupNode:
    """The root; nothing else in the view says which step it is."""
    about = {"everstep_step": step, "everstep_generation": generation}
    return GroupNode("", group_metadata(about))


def zarr_nodes(
    manifest: Manifest, known: Mapping[str, ZarrType]
) -> Iterator[ArrayNode | GroupNode]:
    """All nodes, in the order of their keys.

    The keys of an array are its path and ``/c/…`` or ``/zarr.json``, those of a group end with
    ``zarr.json``; keys are ordered by their UTF-8 bytes.

    Args:
        manifest: the checkpoint.
        known: the types that the reader of the view knows.
    """
    file_sizes = np.array([p.size_bytes for p in manifest.packs], np.int64)
    paths = {node_name(name): tensor for name, tensor in manifest.tensors.items()}
    for key in sorted([*(f"{path}/".encode() for path in paths), b"zarr.json"]):
        if key == b"zarr.json":
            yield root_node(manifest.step, manifest.generation)
            continue
        path = key[:-1].decode()
        tensor = paths[path]
        packs = np.array(tensor.packs, np.int64)
        places = CellPlaces(packs, manifest.file_offsets(tensor.spec.name))
        yield from _tensor_nodes(path, tensor, places, file_sizes, known)


def _tensor_nodes(
    path: str,
    tensor: StoredTensor,
    places: CellPlaces,
    file_sizes: Integers,
    known: Mapping[str, ZarrType],
) -> Iterator[ArrayNode | GroupNode]:
    spec, kind = tensor.spec, zarr_type(tensor.spec.dtype, known)
    attributes: dict[str, Any] = {"everstep_dtype": spec.dtype}
    grid = _as_grid(spec.shape, tensor.layout)
    regular = None
    if grid is not None:
        regular = regular_chunking(grid, places, spec, file_sizes)
    if regular is not None:
        chunking, offsets = regular
        yield ArrayNode(
            path,
            array_metadata(spec.shape, chunking.chunk_shape, kind, attributes),
            chunking.counts,
            places.packs[chunking.cells],
            offsets,
            math.prod(chunking.chunk_shape) * spec.item_bytes,
        )
        return
    by_shape = _pieces_by_shape(tensor.layout)
    names = sorted(by_shape, key=lambda name: f"{name}/")
    for name in names:
        pieces = by_shape[name]
        shape = pieces[0].box.shape
        cells = [piece.cell for piece in pieces]
        items = np.array([piece.first_item for piece in pieces], np.int64)
        where = {"everstep_offsets": [list(piece.box.offset) for piece in pieces]}
        yield ArrayNode(
            f"{path}/{name}",
            array_metadata((len(pieces), *shape), (1, *shape), kind, {**attributes, **where}),
            (len(pieces), *(1 for _ in shape)),
            places.packs[cells],
            places.offsets[cells] + items * spec.item_bytes,
            math.prod(shape) * spec.item_bytes,
        )
    attributes = {**attributes, "everstep_shape": list(spec.shape), "everstep_arrays": names}
    yield GroupNode(path, group_metadata(attributes))


def _as_grid(shape: tuple[int, ...], layout: Layout) -> Grid | None:
    """The grid of boxes that cells are, if they are: flat ranges can be whole rows."""
    if isinstance(layout, Grid):
        return layout
    row = math.prod(shape[1:])
    if not layout.n_cells:
        return Grid(tuple((0, n) if n else (0,) for n in shape))
    if isinstance(layout, FlatRanges) and all(bound % row == 0 for bound in layout.bounds):
        bounds = (tuple(bound // row for bound in layout.bounds), *((0, n) for n in shape[1:]))
        return Grid(bounds[: len(shape)])
    return None


class _Piece(NamedTuple):
    """A box that lies densely in a cell, from one of its items on."""

    cell: int
    first_item: int
    box: Box


def _pieces_by_shape(layout: Layout) -> dict[str, list[_Piece]]:
    """The boxes that all cells consist of, by the name of their shape; a box is one piece."""
    found: dict[str, list[_Piece]] = {}
    for number, cell in enumerate(layout.cells()):
        for piece in _pieces(layout, number, cell):
            found.setdefault("x".join(map(str, piece.box.shape)), []).append(piece)
    return found


def _pieces(layout: Layout, number: int, cell: Box) -> Iterator[_Piece]:
    if not isinstance(layout, FlatRanges):
        yield _Piece(number, 0, cell)
        return
    begin = cell.offset[0]
    for box in flat_boxes(layout.shape, begin, begin + cell.shape[0]):
        yield _Piece(number, flat_index(layout.shape, box.offset) - begin, box)
