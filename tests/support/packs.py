"""Boxes of packs read one by one, planned as slowly as the format is described."""

from everstep.checkpoint.layout import Box, Fragment
from everstep.checkpoint.pack import StridedBytes, dense_strides
from everstep.checkpoint.pack_reader import PackReader
from everstep.checkpoint.pack_walk import PackCopy


def read_box(
    reader: PackReader,
    fragment: Fragment,
    start: int,
    box: Box,
    target: StridedBytes,
    target_bytes: int = 0,
) -> None:
    """Copy a box of a fragment that lies at byte ``start`` of the data into an array."""
    item_bytes = fragment.spec.item_bytes
    strides = dense_strides(fragment.box.shape, item_bytes)
    begin = start + sum(i * s for i, s in zip(box.relative_to(fragment.box), strides, strict=True))
    last = begin + sum((n - 1) * s for n, s in zip(box.shape, strides, strict=True))
    end = last + item_bytes
    reader.read([PackCopy(begin, end, strides, box.shape, item_bytes, target, target_bytes)])
