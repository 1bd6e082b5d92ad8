"""A checkpoint as a Zarr group: its arrays, their chunks, and where the chunks lie (pure).

The root has one member for each tensor, under the tensor's logical name: an array, where the cells
can be cut into a regular grid of chunks. Where they cannot, a group with one array for each shape
of cell, ``3x2`` for cells of 3 by 2; its first dim counts the cells, and its attribute
``everstep_offsets`` says where in the tensor each belongs. So every tensor is there, and none is
there wrongly.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from everstep.checkpoint.layout import Grid
from everstep.checkpoint.manifest import Manifest, StoredTensor
from everstep.checkpoint.views.chunking import regular_chunking
from everstep.checkpoint.views.placement import CellPlaces, Integers, place_cells
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
    places = place_cells(manifest)
    file_sizes = np.array([p.size_bytes for p in manifest.packs], np.int64)
    paths = {node_name(name): tensor for name, tensor in manifest.tensors.items()}
    root = {"everstep_step": manifest.step, "everstep_generation": manifest.generation}
    for key in sorted([*(f"{path}/".encode() for path in paths), b"zarr.json"]):
        if key == b"zarr.json":
            yield GroupNode("", group_metadata(root))
            continue
        path = key[:-1].decode()
        tensor = paths[path]
        yield from _tensor_nodes(path, tensor, places[tensor.spec.name], file_sizes, known)


def _tensor_nodes(
    path: str,
    tensor: StoredTensor,
    places: CellPlaces,
    file_sizes: Integers,
    known: Mapping[str, ZarrType],
) -> Iterator[ArrayNode | GroupNode]:
    spec, kind = tensor.spec, zarr_type(tensor.spec.dtype, known)
    attributes: dict[str, Any] = {"everstep_dtype": spec.dtype}
    regular = regular_chunking(tensor.grid, places, spec.item_bytes, file_sizes)
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
    names = []
    for name, shape, cells, cell_offsets in _cells_by_shape(tensor.grid):
        names.append(name)
        yield ArrayNode(
            f"{path}/{name}",
            array_metadata(
                (len(cells), *shape),
                (1, *shape),
                kind,
                {**attributes, "everstep_offsets": cell_offsets},
            ),
            (len(cells), *(1 for _ in shape)),
            places.packs[cells],
            places.offsets[cells],
            math.prod(shape) * spec.item_bytes,
        )
    attributes = {**attributes, "everstep_shape": list(spec.shape), "everstep_arrays": names}
    yield GroupNode(path, group_metadata(attributes))


def _cells_by_shape(
    grid: Grid,
) -> Iterator[tuple[str, tuple[int, ...], list[int], list[list[int]]]]:
    """For each shape of cell, ordered by name: name, shape, numbers in C order, offsets."""
    found: dict[tuple[int, ...], tuple[list[int], list[list[int]]]] = {}
    for number, cell in enumerate(grid.cells()):
        numbers, offsets = found.setdefault(cell.shape, ([], []))
        numbers.append(number)
        offsets.append(list(cell.offset))
    named = sorted((f"{'x'.join(map(str, shape))}/", shape) for shape in found)
    for name, shape in named:
        yield name[:-1], shape, *found[shape]
