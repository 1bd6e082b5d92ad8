"""Tensors described as places of other tensors (pure): what every conversion is made of.

A *view* is a tensor whose boxes (*pieces*) each say where their items come from: a *place* is an
affine map into one source tensor, "item i of the box is item ``offset + i . strides`` of the source
in C order". Cutting, joining, padding, transposing, flattening and reshaping map places to places,
so that any chain of them is still one copy per piece.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, product
from typing import Literal

from everstep.checkpoint.layout import Box, TensorSpec, flat_boxes, flat_index
from everstep.checkpoint.pack import dense_strides

Combine = Literal["same", "mean"]
"""How several places make one box: all hold the same bytes (checked), or their mean is taken."""


@dataclass(frozen=True)
class Place:
    """Where the items of a box are in a source tensor; counted in items, not bytes."""

    tensor: str
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A box of a view, made of places: none are zeros, one is a copy, several are combined."""

    box: Box
    places: tuple[Place, ...]
    combine: Combine = "same"

    def within(self, box: Box) -> "Piece | None":
        """The part of this piece that lies in ``box``; None where the two share no item."""
        common = self.box.intersect(box)
        return None if common is None else self.at(common)

    def at(self, box: Box) -> "Piece":
        """One box of this piece."""
        inside = box.relative_to(self.box)
        places = tuple(
            replace(p, offset=p.offset + sum(i * s for i, s in zip(inside, p.strides, strict=True)))
            for p in self.places
        )
        return replace(self, box=box, places=places)


@dataclass(frozen=True)
class View:
    """A tensor that is not there yet; its pieces cover it exactly once, empty ones left out."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Read:
    """Fill a box of a source tensor into memory; offset and strides of the memory in bytes."""

    box: Box
    offset_bytes: int
    strides_bytes: tuple[int, ...]


def whole(spec: TensorSpec) -> View:
    """A source tensor as it is."""
    place = Place(spec.name, 0, dense_strides(spec.shape, 1))
    pieces = (Piece(spec.whole, (place,)),) if spec.whole.size else ()
    return View(spec.dtype, spec.shape, pieces)


def cut(view: View, box: Box) -> View:
    """One box of a view."""
    found = (piece.within(box) for piece in view.pieces)
    moved = [
        replace(piece, box=Box(piece.box.relative_to(box), piece.box.shape))
        for piece in found
        if piece is not None
    ]
    return View(view.dtype, box.shape, tuple(moved))


def concat(views: Sequence[View], dim: int) -> View:
    """Views joined along a dim. Raises ValueError if their other dims or dtypes differ."""
    first = views[0]
    _same_dtype(views)
    for view in views:
        if not 0 <= dim < len(view.shape):
            raise ValueError(f"a tensor of shape {list(view.shape)} has no dim {dim}")
        if _without(view.shape, dim) != _without(first.shape, dim):
            raise ValueError(
                f"shapes {list(first.shape)} and {list(view.shape)} cannot be joined along dim "
                f"{dim}"
            )
    starts = list(accumulate((v.shape[dim] for v in views), initial=0))
    pieces = tuple(
        replace(piece, box=_moved(piece.box, dim, start))
        for view, start in zip(views, starts[:-1], strict=True)
        for piece in view.pieces
    )
    return View(first.dtype, _with(first.shape, dim, starts[-1]), pieces)


def split(view: View, dim: int, sizes: Sequence[int]) -> list[View]:
    """Inverse of ``concat``. Raises ValueError if the sizes do not add up."""
    if not 0 <= dim < len(view.shape) or sum(sizes) != view.shape[dim]:
        raise ValueError(
            f"a tensor of shape {list(view.shape)} does not split into {list(sizes)} along dim "
            f"{dim}"
        )
    zeros = (0,) * len(view.shape)
    return [
        cut(view, Box(_with(zeros, dim, begin), _with(view.shape, dim, end - begin)))
        for begin, end in pairwise(accumulate(sizes, initial=0))
    ]


def pad(view: View, dim: int, to: int) -> View:
    """A view with zeros after it. Raises ValueError if it is larger already."""
    if not 0 <= dim < len(view.shape) or view.shape[dim] > to:
        raise ValueError(f"shape {list(view.shape)} cannot be padded to {to} along dim {dim}")
    zeros_shape = _with(view.shape, dim, to - view.shape[dim])
    box = Box((0,) * len(zeros_shape), zeros_shape)
    zeros = View(view.dtype, zeros_shape, (Piece(box, ()),) if box.size else ())
    return concat([view, zeros], dim)


def strip(view: View, dim: int, size: int) -> View:
    """Inverse of ``pad``. Raises ValueError if the view is smaller."""
    if not 0 <= dim < len(view.shape) or view.shape[dim] < size:
        raise ValueError(f"shape {list(view.shape)} cannot be cut to {size} along dim {dim}")
    return cut(view, Box((0,) * len(view.shape), _with(view.shape, dim, size)))


def permute(view: View, dims: Sequence[int]) -> View:
    """The view whose dim ``d`` is dim ``dims[d]`` of this one. Raises ValueError."""
    if sorted(dims) != list(range(len(view.shape))):
        raise ValueError(f"{list(dims)} is no order of the dims of shape {list(view.shape)}")

    def turned(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(values[d] for d in dims)

    pieces = tuple(
        replace(
            p,
            box=Box(turned(p.box.offset), turned(p.box.shape)),
            places=tuple(replace(place, strides=turned(place.strides)) for place in p.places),
        )
        for p in view.pieces
    )
    return View(view.dtype, turned(view.shape), pieces)


def combine(views: Sequence[View], how: Combine) -> View:
    """Whole source tensors of one shape as one. Raises ValueError if shapes or dtypes differ."""
    _same_dtype(views)
    first = views[0]
    for view in views:
        if view.shape != first.shape:
            raise ValueError(f"shapes {list(first.shape)} and {list(view.shape)} are not the same")
    if not first.pieces:
        return first
    places = tuple(place for view in views for piece in view.pieces for place in piece.places)
    return View(first.dtype, first.shape, (Piece(first.pieces[0].box, places, how),))


def flatten(view: View) -> View:
    """All items in C order, as one dim."""
    pieces = tuple(run for piece in view.pieces for run in _runs(piece, view.shape))
    return View(view.dtype, (math.prod(view.shape),), pieces)


def unflatten(view: View, shape: tuple[int, ...]) -> View:
    """Inverse of ``flatten``. Raises ValueError if the number of items is another."""
    if view.shape != (math.prod(shape),):
        raise ValueError(f"shape {list(view.shape)} cannot be read as {list(shape)}")
    dense = dense_strides(shape, 1)
    pieces = []
    for piece in view.pieces:
        (begin,), (count,) = piece.box.offset, piece.box.shape
        for box in flat_boxes(shape, begin, begin + count):
            skipped = flat_index(shape, box.offset) - begin
            places = tuple(
                Place(p.tensor, p.offset + skipped * unit, tuple(s * unit for s in dense))
                for p in piece.places
                for (unit,) in [p.strides]
            )
            pieces.append(replace(piece, box=box, places=places))
    return View(view.dtype, shape, tuple(pieces))


def plan_reads(
    source_shape: tuple[int, ...],
    place: Place,
    extents: tuple[int, ...],
    offset_bytes: int,
    strides_bytes: tuple[int, ...],
) -> Iterator[Read]:
    """The boxes of a source tensor that fill memory with the items of a place.

    Args:
        source_shape: of the source tensor.
        place: where the first item is, and how far the others are.
        extents: items per dim of the place; at least one each.
        offset_bytes: of the first item in the memory.
        strides_bytes: of the memory, per dim of the place.
    """
    axes = [
        (stride, extent, step)
        for stride, extent, step in zip(place.strides, extents, strides_bytes, strict=True)
        if extent > 1
    ]
    axes.sort(reverse=True)
    yield from _reads(source_shape, place.offset, axes, offset_bytes)


_Axis = tuple[int, int, int]
"""(stride in the source in items, extent, stride in the memory in bytes)."""


def _reads(
    shape: tuple[int, ...], offset: int, axes: list[_Axis], offset_bytes: int
) -> Iterator[Read]:
    read = _as_box(shape, offset, axes, offset_bytes)
    if read is not None:
        yield read
        return
    merged: list[_Axis] = []
    for stride, extent, step in axes:
        if merged and merged[-1][0] == stride * extent and merged[-1][2] == step * extent:
            extent *= merged.pop()[1]
        merged.append((stride, extent, step))
    stride, extent, step = merged[0]
    dense = dense_strides(shape, 1)
    if len(merged) == 1 and stride == 1:
        for box in flat_boxes(shape, offset, offset + extent):
            skipped = flat_index(shape, box.offset) - offset
            yield Read(box, offset_bytes + skipped * step, tuple(s * step for s in dense))
        return
    for i in range(extent):
        yield from _reads(shape, offset + i * stride, merged[1:], offset_bytes + i * step)


def _as_box(
    shape: tuple[int, ...], offset: int, axes: list[_Axis], offset_bytes: int
) -> Read | None:
    """One read where every axis runs along a dim of the source and stays inside of it."""
    dense = dense_strides(shape, 1)
    dims = {stride: dim for dim, stride in enumerate(dense) if shape[dim] > 1}
    begin, left = [], offset
    for stride in dense:
        index, left = divmod(left, stride)
        begin.append(index)
    extents, steps = [1] * len(shape), [0] * len(shape)
    for stride, extent, step in axes:
        dim = dims.pop(stride, None)
        if dim is None or begin[dim] + extent > shape[dim]:
            return None
        extents[dim], steps[dim] = extent, step
    return Read(Box(tuple(begin), tuple(extents)), offset_bytes, tuple(steps))


def _runs(piece: Piece, shape: tuple[int, ...]) -> Iterator[Piece]:
    """A piece of a tensor of ``shape`` as ranges of it in C order."""
    extents = piece.box.shape
    units = [_unit(place.strides, extents) for place in piece.places]
    joined, length = len(extents), 1
    while joined:
        d = joined - 1
        continues = all(
            extents[d] == 1 or p.strides[d] == unit * length
            for p, unit in zip(piece.places, units, strict=True)
        )
        if not continues:
            break
        joined, length = d, length * extents[d]
        if extents[d] != shape[d]:
            break
    for index in product(*map(range, extents[:joined])):
        at = [*index, *(0 for _ in extents[joined:])]
        begin = flat_index(shape, [o + i for o, i in zip(piece.box.offset, at, strict=True)])
        places = tuple(
            Place(p.tensor, p.offset + sum(i * s for i, s in zip(at, p.strides, strict=True)), (u,))
            for p, u in zip(piece.places, units, strict=True)
        )
        yield replace(piece, box=Box((begin,), (length,)), places=places)


def _unit(strides: tuple[int, ...], extents: tuple[int, ...]) -> int:
    """Distance of neighbours in C order: the stride of the last dim that has any."""
    return next((s for s, n in zip(strides[::-1], extents[::-1], strict=True) if n > 1), 1)


def _moved(box: Box, dim: int, by: int) -> Box:
    return Box(_with(box.offset, dim, box.offset[dim] + by), box.shape)


def _with(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim + 1 :])


def _without(values: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return (*values[:dim], *values[dim + 1 :])


def _same_dtype(views: Sequence[View]) -> None:
    found = sorted({view.dtype for view in views})
    if len(found) > 1:
        raise ValueError(f"dtypes {', '.join(found)} are not the same")
