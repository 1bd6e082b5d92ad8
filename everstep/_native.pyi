from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Byte buffers are one-dimensional, C-contiguous and of type uint8; sources may be read-only.
_Source = bytes | bytearray | memoryview | NDArray[np.uint8]

def kernels() -> dict[str, str]: ...
def crc32c(data: _Source, seed: int = 0) -> int: ...
def crc32c_combine(crc_a: int, crc_b: int, bytes_b: int) -> int: ...
def crc32c_blocks(
    data: _Source, block_bytes: int, out: NDArray[np.uint32], threads: int = 1
) -> None: ...
def copy_box(
    dst: NDArray[np.uint8],
    dst_offset_bytes: int,
    dst_strides_bytes: Sequence[int],
    src: _Source,
    src_offset_bytes: int,
    src_strides_bytes: Sequence[int],
    shape: Sequence[int],
    item_bytes: int,
    threads: int = 1,
) -> None: ...
def gather_box_crc(
    dst: NDArray[np.uint8],
    dst_offset_bytes: int,
    src: _Source,
    src_offset_bytes: int,
    src_strides_bytes: Sequence[int],
    shape: Sequence[int],
    item_bytes: int,
    begin_bytes: int,
    end_bytes: int,
    stream_offset_bytes: int,
    block_bytes: int,
    block_crcs: NDArray[np.uint32],
    threads: int = 1,
) -> None: ...
def scatter_box_crc(
    dst: NDArray[np.uint8],
    dst_offset_bytes: int,
    dst_strides_bytes: Sequence[int],
    src: _Source,
    src_offset_bytes: int,
    src_strides_bytes: Sequence[int],
    shape: Sequence[int],
    item_bytes: int,
    begin_bytes: int,
    end_bytes: int,
    stream_offset_bytes: int,
    block_bytes: int,
    block_crcs: NDArray[np.uint32],
    threads: int = 1,
) -> None: ...
def pages_missing(data: _Source) -> bool: ...
def populate_pages(data: _Source, told: bool) -> int: ...

class CopyPlan:
    def __init__(
        self,
        starts: Sequence[int],
        shapes: Sequence[Sequence[int]],
        strides_bytes: Sequence[Sequence[int]],
        item_bytes: Sequence[int],
        data_bytes: int,
        block_bytes: int,
    ) -> None: ...
    @property
    def blocks(self) -> int: ...

class CopyJob:
    @property
    def done(self) -> bool: ...
    @property
    def copied_bytes(self) -> int: ...
    def help(self) -> float: ...
    def wait(self, timeout_s: float) -> bool: ...
    def set_rate(self, bytes_per_s: float | None) -> None: ...
    def cancel(self) -> None: ...
    def stats(self) -> dict[str, float]: ...

class Copier:
    def __init__(self, threads: int, nice: int) -> None: ...
    def start(
        self,
        plan: CopyPlan,
        addresses: NDArray[np.uint64],
        dst: NDArray[np.uint8],
        crcs: NDArray[np.uint32],
        bytes_per_s: float | None,
    ) -> CopyJob: ...
    def close(self) -> None: ...
