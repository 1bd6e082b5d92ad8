"""Live memory for the copier, and what a copy of it must be."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everstep.checkpoint import copier, kernels
from tests.support.boxes import ITEM_SIZES_BYTES, StridedBox, random_box, random_bytes, random_shape

MIB = 1 << 20


@dataclass
class Sources:
    """Live memory to copy, and the arguments that say so."""

    boxes: list[StridedBox]
    block_bytes: int = MIB

    @property
    def data_bytes(self) -> int:
        return sum(box.total_bytes for box in self.boxes)

    @property
    def starts(self) -> list[int]:
        sizes = [box.total_bytes for box in self.boxes]
        return [sum(sizes[:i]) for i in range(len(sizes))]

    @property
    def addresses(self) -> NDArray[np.uint64]:
        # Nothing is at address 1, and nobody looks there: the box is empty.
        return np.array(
            [
                box.buffer.ctypes.data + box.offset_bytes if box.total_bytes else 1
                for box in self.boxes
            ],
            np.uint64,
        )

    def plan(self, module: ModuleType = copier) -> Any:
        return module.CopyPlan(
            self.starts,
            [box.shape for box in self.boxes],
            [box.strides_bytes for box in self.boxes],
            [box.item_bytes for box in self.boxes],
            data_bytes=self.data_bytes,
            block_bytes=self.block_bytes,
        )

    def empty_target(self) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
        blocks = -(-self.data_bytes // self.block_bytes)
        return np.full(self.data_bytes, 0xA5, np.uint8), np.full(blocks, 7, np.uint32)

    def expected(self) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
        """By the one-pass gather, fragment after fragment."""
        data, crcs = self.empty_target()
        crcs[:] = 0
        for box, start in zip(self.boxes, self.starts, strict=True):
            kernels.gather_box_crc(
                data[start : start + box.total_bytes],
                0,
                box.buffer,
                box.offset_bytes,
                box.strides_bytes,
                box.shape,
                box.item_bytes,
                0,
                box.total_bytes,
                start,
                self.block_bytes,
                crcs,
            )
        return data, crcs


def random_sources(seed: int, *, fragments: int, items: int, block_bytes: int) -> Sources:
    rng = np.random.default_rng(seed)
    boxes = []
    for _ in range(fragments):
        shape = random_shape(rng, int(rng.integers(1, items)))
        item_bytes = int(rng.choice(ITEM_SIZES_BYTES))
        boxes.append(random_box(rng, shape, item_bytes, as_source=True))
    return Sources(boxes, block_bytes)


def dense_sources(mib: int) -> Sources:
    rng = np.random.default_rng(mib)
    return Sources([StridedBox(random_bytes(rng, mib * MIB), 0, (1,), (mib * MIB,), 1)])
