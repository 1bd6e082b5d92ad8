"""Random strided boxes in byte buffers, for comparing the kernels with their references."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ITEM_SIZES_BYTES = (1, 2, 3, 4, 8, 12, 16, 24)


@dataclass(frozen=True)
class StridedBox:
    """A box in its own random buffer: all offsets and strides in bytes."""

    buffer: NDArray[np.uint8]
    offset_bytes: int
    strides_bytes: tuple[int, ...]
    shape: tuple[int, ...]
    item_bytes: int

    @property
    def total_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.item_bytes


def random_bytes(rng: np.random.Generator, count: int) -> NDArray[np.uint8]:
    """`count` random bytes that start at a random alignment."""
    shift = int(rng.integers(0, 64))
    return rng.integers(0, 256, count + shift, dtype=np.uint8)[shift:]


def random_shape(rng: np.random.Generator, total_items: int) -> tuple[int, ...]:
    """Zero to five dimensions with about `total_items` items, now and then none."""
    shape: list[int] = []
    left = total_items
    for _ in range(int(rng.integers(0, 6))):
        extent = int(rng.integers(1, max(2, min(left, 40)) + 1))
        shape.append(extent)
        left = max(1, left // extent)
    if shape and rng.random() < 0.5:
        shape[int(rng.integers(0, len(shape)))] *= left
    if shape and rng.random() < 0.03:
        shape[int(rng.integers(0, len(shape)))] = 0
    return tuple(shape)


def random_box(
    rng: np.random.Generator, shape: tuple[int, ...], item_bytes: int, *, as_source: bool
) -> StridedBox:
    """A box with gaps, permuted dimensions and negative strides; a source also with zero strides.

    Half of all boxes are in C order without gaps, so that dimensions can be merged.
    """
    order = list(range(len(shape)))
    plain = rng.random() < 0.5
    if not plain:
        rng.shuffle(order)
    strides = [0] * len(shape)
    stride = item_bytes
    lowest = 0
    for dim in reversed(order):
        if not plain and rng.random() < 0.3:
            stride += int(rng.integers(0, 3 * item_bytes))
        strides[dim] = stride
        reach = stride * max(shape[dim] - 1, 0)
        stride = reach + stride
        if not plain and rng.random() < 0.2:
            strides[dim] = -strides[dim]
            lowest += reach
        elif as_source and rng.random() < 0.1:
            strides[dim] = 0
    offset = lowest + int(rng.integers(0, 70))
    buffer = random_bytes(rng, offset + stride + int(rng.integers(0, 70)))
    return StridedBox(buffer, offset, tuple(strides), shape, item_bytes)
