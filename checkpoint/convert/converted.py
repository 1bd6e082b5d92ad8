"""A plan carried out: tensors that are made of others, any box of them, when they are read."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from everstep.checkpoint.convert.cast import FLOATS, encode
from everstep.checkpoint.convert.errors import ConversionError
from everstep.checkpoint.convert.plan import Plan
from everstep.checkpoint.convert.source import Source
from everstep.checkpoint.convert.view import Piece, Place, plan_reads
from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.layout import ITEM_BYTES, Box, TensorSpec
from everstep.checkpoint.numbers import numbers
from everstep.checkpoint.pack import StridedBytes, dense_strides
from everstep.checkpoint.pieces import pieces

SCRATCH_BYTES = 4 * 2**20
"""Of source data at a time, where it is not copied as it is."""


class Converted:
    """The tensors of a plan over a source; a ``Source`` itself.

    What is only renamed, cut, joined or transposed is copied straight to where it is wanted; casts,
    means and the comparison of replicas need a few times ``SCRATCH_BYTES``.
    """

    def __init__(self, plan: Plan, source: Source) -> None:
        self._plan, self._source = plan, source
        self.tensors: Mapping[str, TensorSpec] = plan.tensors

    def fill(self, name: str, wanted: Box, target: StridedBytes) -> None:
        """See ``Source``; also raises ConversionError where replicas differ."""
        view, dtype = self._plan.views[name], self.tensors[name].dtype
        for piece in view.pieces:
            common = piece.within(wanted)
            if common is None:
                continue
            inside = common.box.relative_to(wanted)
            offset = target.offset_bytes + _dot(inside, target.strides_bytes)
            place = StridedBytes(target.buffer, offset, target.strides_bytes)
            if not common.places:
                items = _items(place, common.box.shape, ITEM_BYTES[dtype])
                items[...] = np.zeros((), items.dtype)
            elif len(common.places) == 1 and dtype == view.dtype:
                self._copy(common.places[0], common.box.shape, place)
            else:
                self._compute(common, view.dtype, dtype, name, place)

    def _copy(self, place: Place, extents: tuple[int, ...], target: StridedBytes) -> None:
        shape = self._source.tensors[place.tensor].shape
        for read in plan_reads(shape, place, extents, target.offset_bytes, target.strides_bytes):
            memory = StridedBytes(target.buffer, read.offset_bytes, read.strides_bytes)
            self._source.fill(place.tensor, read.box, memory)

    def _compute(
        self, piece: Piece, source_dtype: str, dtype: str, name: str, target: StridedBytes
    ) -> None:
        for box in pieces(piece.box, SCRATCH_BYTES // ITEM_BYTES[source_dtype]):
            data = self._combined(piece.at(box), source_dtype, name)
            if dtype != source_dtype:
                data = encode(numbers(source_dtype, data), dtype)
            inside = box.relative_to(piece.box)
            offset = target.offset_bytes + _dot(inside, target.strides_bytes)
            block = StridedBytes(target.buffer, offset, target.strides_bytes)
            items = _items(block, box.shape, ITEM_BYTES[dtype])
            items[...] = data.view(items.dtype).reshape(box.shape)

    def _combined(self, part: Piece, dtype: str, name: str) -> ByteArray:
        """The dense bytes of one block, from all places that it is made of."""
        first, *others = part.places
        data = self._dense(first, part.box.shape, dtype)
        if part.combine == "same":
            for other in others:
                if not np.array_equal(self._dense(other, part.box.shape, dtype), data):
                    problem = f"its replicas {first.tensor!r} and {other.tensor!r} differ"
                    raise ConversionError(repr(name), [problem])
            return data
        if dtype not in FLOATS:
            raise ConversionError(repr(name), [f"there is no mean of {dtype} tensors"])
        with np.errstate(invalid="ignore"):  # signalling NaN
            total = numbers(dtype, data).astype(np.float64)
            for other in others:
                total += numbers(dtype, self._dense(other, part.box.shape, dtype))
        return encode(total / len(part.places), dtype)

    def _dense(self, place: Place, extents: tuple[int, ...], dtype: str) -> ByteArray:
        item_bytes = ITEM_BYTES[dtype]
        strides = dense_strides(extents, item_bytes)
        data = np.empty(int(np.prod(extents, dtype=np.int64)) * item_bytes, np.uint8)
        self._copy(place, extents, StridedBytes(data, 0, strides))
        return data


def _items(target: StridedBytes, shape: tuple[int, ...], item_bytes: int) -> NDArray[np.void]:
    """Memory as an array of opaque items."""
    return np.ndarray(
        shape,
        np.dtype(f"V{item_bytes}"),
        target.buffer,
        target.offset_bytes,
        target.strides_bytes,
    )


def _dot(index: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return sum(i * s for i, s in zip(index, strides, strict=True))
