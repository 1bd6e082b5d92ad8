"""Cutting boxes into pieces of bounded size, so that tensors of any size can be streamed (pure)."""

import math
from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import numpy.typing as npt

from everstep.checkpoint.layout import Box, flat_index

PIECE_BYTES = 4 * 2**20
"""What is read of a tensor at a time by whoever streams it."""


def pieces(box: Box, max_items: int) -> Iterator[Box]:
    """Boxes of at most ``max_items`` items that make up a box; none for an empty one.

    Each is a contiguous run of the box in C order, and they come in that order: the dense bytes of
    the box are the bytes of its pieces, one after the other.

    Args:
        box: what to cut.
        max_items: at least 1.
    """
    if not box.size:
        return
    inner, dim = 1, len(box.shape)
    while dim and inner * box.shape[dim - 1] <= max_items:
        dim -= 1
        inner *= box.shape[dim]
    if not dim:
        yield box
        return
    cut, step = dim - 1, max_items // inner
    for lead in product(*(range(n) for n in box.shape[:cut])):
        offset = tuple(o + i for o, i in zip(box.offset, lead, strict=False))
        for at in range(0, box.shape[cut], step):
            yield Box(
                (*offset, box.offset[cut] + at, *box.offset[dim:]),
                (*(1,) * cut, min(step, box.shape[cut] - at), *box.shape[dim:]),
            )


def linear_indices(shape: Sequence[int], box: Box) -> npt.NDArray[np.uint64]:
    """For each item of a box, in C order, its index in the flattened tensor of a shape."""
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    found = np.full(1, flat_index(shape, box.offset), np.uint64)
    for n, stride in zip(box.shape, strides, strict=True):
        steps = np.arange(n, dtype=np.uint64) * np.uint64(stride)
        found = (found[:, None] + steps).reshape(-1)
    return found
