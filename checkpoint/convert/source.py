"""What conversions read from: tensors by name, any box of them, into any memory."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.layout import Box, TensorSpec
from everstep.checkpoint.pack import StridedBytes, dense_strides


class Source(Protocol):
    """Tensors that can be read box by box."""

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """What there is, by name."""
        ...

    def fill(self, name: str, wanted: Box, target: StridedBytes) -> None:
        """Copy a box of a tensor into an array of the box's shape.

        Raises:
            DamagedError: the source is not what it should be; part of the array may be filled.
        """
        ...


def read_box(source: Source, name: str, box: Box) -> ByteArray:
    """The bytes of a box of a tensor, dense, in C order."""
    item_bytes = source.tensors[name].item_bytes
    data = np.empty(box.size * item_bytes, np.uint8)
    if box.size:
        source.fill(name, box, StridedBytes(data, 0, dense_strides(box.shape, item_bytes)))
    return data
