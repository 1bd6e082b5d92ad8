"""Proof that fragments cover a tensor exactly once, and the layout that they form (pure)."""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from everstep.checkpoint.errors import LayoutError
from everstep.checkpoint.layout import (
    Box,
    Boxes,
    FlatRanges,
    Fragment,
    Grid,
    Integers,
    Layout,
    TensorSpec,
)

MAX_CORNERS = 2**24
"""Corners of all boxes of a tensor, counting only the dims along which it is cut."""


class Share(NamedTuple):
    """A distinct fragment of a tensor."""

    number: int
    """Of it among all fragments of the tensor that ranks hold."""
    ranks: tuple[int, ...]
    """Who holds it, ascending."""
    n_items: int


class Holding(NamedTuple):
    """How a tensor is spread over ranks."""

    layout: Layout
    shares: tuple[Share, ...]
    """In the order of the layout's cells; one share of no items where the tensor has none."""


def holdings(
    held: Sequence[Iterable[Fragment]], *, once: bool = False
) -> Iterator[tuple[TensorSpec, list[Fragment], Holding]]:
    """For each tensor, by name, all fragments of it in the order of ranks, and how these hold it.

    Args:
        held: for each rank its fragments.
        once: whether no two ranks may hold the same.

    Raises:
        LayoutError: ranks disagree about a tensor's dtype or shape, or their fragments of it, the
            same ones counted once, leave a hole, overlap, or are in part boxes and in part flat
            ranges; or two are the same.
    """
    found: dict[str, tuple[TensorSpec, list[Fragment], list[int]]] = {}
    for rank, fragments in enumerate(held):
        for fragment in fragments:
            spec = fragment.spec
            known = found.get(spec.name)
            if known is None:
                known = found[spec.name] = spec, [], []
            if known[0] is not spec and known[0] != spec:
                raise LayoutError(
                    f"tensor {spec.name!r} is {known[0].dtype} {known[0].shape} on one rank and "
                    f"{spec.dtype} {spec.shape} on rank {rank}"
                )
            known[1].append(fragment)
            known[2].append(rank)
    for name in sorted(found):
        spec, mine, ranks = found[name]
        try:
            yield spec, mine, _hold(spec.shape, tuple([f[1:] for f in mine]), tuple(ranks), once)
        except ValueError as e:
            raise LayoutError(f"tensor {name!r} of shape {spec.shape}: {e}") from None


@lru_cache(maxsize=128)
def _hold(
    shape: tuple[int, ...],
    cells: tuple[tuple[Box, bool], ...],
    ranks: tuple[int, ...],
    once: bool,
) -> Holding:
    """The tensors of a model are held in few different ways; raises ValueError."""
    holders: dict[tuple[Box, bool], tuple[int, list[int]]] = {}
    for number, (cell, rank) in enumerate(zip(cells, ranks, strict=True)):
        _, mine = holders.setdefault(cell, (number, []))
        if rank not in mine[-1:]:
            mine.append(rank)
        if once and len(mine) > 1:
            raise ValueError(f"two ranks wrote the same part of it, at {list(cell[0].offset)}")
    shares = tuple(
        Share(number, tuple(of_cell), box.size)
        for (box, _), (number, of_cell) in sorted(holders.items(), key=lambda item: item[0])
    )
    return Holding(_layout(shape, holders), shares)


def _layout(shape: tuple[int, ...], cells: Collection[tuple[Box, bool]]) -> Layout:
    """The layout that distinct cells form: a grid where they can, else boxes, or flat ranges.

    Empty ones do not count; an empty tensor has no others.

    Raises:
        ValueError: they leave a hole, overlap, or are in part boxes and in part flat ranges.
    """
    if not math.prod(shape):
        return Grid(tuple((0, n) if n else (0,) for n in shape))
    ordered = sorted(box for box, _ in cells if box.size)
    if len(kinds := {flat for box, flat in cells if box.size}) > 1:
        raise ValueError(
            "it is held as boxes by some ranks and as flat ranges by others: cut it in one way"
        )
    if True in kinds:
        return FlatRanges(shape, _flat_bounds(math.prod(shape), ordered))
    starts: list[set[int]] = [set() for _ in shape]
    for box in ordered:
        for dim, offset in enumerate(box.offset):
            starts[dim].add(offset)
    grid = Grid(tuple((*sorted(s), n) for s, n in zip(starts, shape, strict=True)))
    if (
        grid.n_cells == len(ordered)
        and all(b[0] == 0 and all(lo < hi for lo, hi in pairwise(b)) for b in grid.bounds)
        and list(grid.cells()) == ordered
    ):
        return grid
    check_boxes(shape, ordered)
    return Boxes(tuple(ordered))


def _flat_bounds(size: int, ordered: Sequence[Box]) -> tuple[int, ...]:
    bounds = [0]
    for box in ordered:
        if box.offset[0] != bounds[-1]:
            times = 0 if box.offset[0] > bounds[-1] else 2
            at = min(box.offset[0], bounds[-1])
            raise ValueError(f"item {at} of the flattened tensor is held {times} times, not once")
        bounds.append(box.offset[0] + box.shape[0])
    if bounds[-1] != size:
        raise ValueError(f"flat ranges end at item {bounds[-1]} of {size}")
    return tuple(bounds)


def check_boxes(shape: Sequence[int], boxes: Sequence[Box]) -> None:
    """Prove that boxes cover a tensor exactly once, in O(n log n) for n boxes.

    A function that is constant on boxes is determined by its mixed difference along all dims, and
    that of a box is +1 or -1 at its corners and 0 elsewhere. So the boxes cover the tensor exactly
    once if and only if their corners, less those of the whole, cancel. Where they do not, the
    first corner that is left (in C order) is an item that is covered never or more than once: no
    other corner is before it in every dim.

    Args:
        shape: of the tensor; no dim is empty.
        boxes: none is empty, all have as many dims as the tensor.

    Raises:
        ValueError: they do not; names an item and how often it is covered.
    """
    whole = Box((0,) * len(shape), tuple(shape))
    if not boxes:
        raise ValueError("nothing of it is held")
    count = len(boxes) + 1, len(shape)
    begins = np.array([b.offset for b in (*boxes, whole)], np.int64).reshape(count)
    ends = begins + np.array([b.shape for b in (*boxes, whole)], np.int64).reshape(count)
    if (ends > ends[-1]).any() or (begins < 0).any():
        raise ValueError("a box leaves the tensor")
    cut = np.flatnonzero(((begins > 0) | (ends < ends[-1])).any(axis=0)).tolist()
    if len(begins) << len(cut) > MAX_CORNERS:
        raise ValueError(f"{len(boxes)} boxes cut {len(cut)} dims, which is too many to check")
    keys = np.zeros(len(begins), np.int64)  # ranks the corners in C order
    weights = np.ones(len(begins), np.int64)
    weights[-1] = -1
    for dim in cut:
        places, ranks = np.unique(
            np.concatenate([begins[:, dim], ends[:, dim]]), return_inverse=True
        )
        times = len(keys) // len(begins)
        keys = np.unique(keys, return_inverse=True)[1] * len(places)
        lower, upper = np.tile(ranks[: len(begins)], times), np.tile(ranks[len(begins) :], times)
        keys = np.concatenate([keys + lower, keys + upper])
        weights = np.concatenate([weights, -weights])
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    left = np.zeros(len(first), np.int64)
    np.add.at(left, inverse, weights)
    if left.any():
        _raise_at(int(first[np.flatnonzero(left)[0]]), cut, begins, ends)


def _raise_at(corner: int, cut: Sequence[int], begins: Integers, ends: Integers) -> None:
    bits, box = divmod(corner, len(begins))
    item = np.zeros(begins.shape[1], np.int64)
    for number, dim in enumerate(cut):
        item[dim] = (ends if bits >> number & 1 else begins)[box, dim]
    times = int(((begins[:-1] <= item) & (item < ends[:-1])).all(axis=1).sum())
    raise ValueError(f"item {item.tolist()} is held by {times} of its boxes, not by one")
