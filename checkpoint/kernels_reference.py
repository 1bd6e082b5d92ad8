"""The kernels of `kernels` once more, slow and obvious, as the measure of the fast ones.

Same signatures, except that there are no threads; arguments are taken to be valid.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_POLYNOMIAL = 0x82F63B78  # Castagnoli, reflected


def _table_entry(byte: int) -> int:
    value = byte
    for _ in range(8):
        value = (value >> 1) ^ (_POLYNOMIAL if value & 1 else 0)
    return value


_TABLE = [_table_entry(byte) for byte in range(256)]


def crc32c(data: NDArray[np.uint8], seed: int = 0) -> int:
    """CRC-32C of the bytes, continuing from `seed`: one table lookup per byte."""
    state = seed ^ 0xFFFFFFFF
    for byte in data.tobytes():
        state = (state >> 8) ^ _TABLE[(state ^ byte) & 0xFF]
    return state ^ 0xFFFFFFFF


def crc32c_combine(crc_a: int, crc_b: int, bytes_b: int) -> int:
    """CRC-32C of A followed by B: a CRC is linear, so A's is moved over as many zero bytes."""
    for _ in range(bytes_b):
        crc_a = (crc_a >> 8) ^ _TABLE[crc_a & 0xFF]
    return crc_a ^ crc_b


def crc32c_blocks(data: NDArray[np.uint8], block_bytes: int) -> NDArray[np.uint32]:
    """One CRC-32C per block of `block_bytes`; the last block may be short."""
    starts = range(0, data.size, block_bytes)
    return np.array([crc32c(data[at : at + block_bytes]) for at in starts], np.uint32)


def box_view(
    buffer: NDArray[np.uint8],
    offset_bytes: int,
    strides_bytes: Sequence[int],
    shape: Sequence[int],
    item_bytes: int,
) -> NDArray[np.uint8]:
    """The box as a strided view of shape (*shape, item_bytes)."""
    return np.lib.stride_tricks.as_strided(
        buffer[offset_bytes:], (*shape, item_bytes), (*strides_bytes, 1)
    )


def copy_box(
    dst: NDArray[np.uint8],
    dst_offset_bytes: int,
    dst_strides_bytes: Sequence[int],
    src: NDArray[np.uint8],
    src_offset_bytes: int,
    src_strides_bytes: Sequence[int],
    shape: Sequence[int],
    item_bytes: int,
) -> None:
    """Copies a box of `shape` items from `src` to `dst`."""
    target = box_view(dst, dst_offset_bytes, dst_strides_bytes, shape, item_bytes)
    target[...] = box_view(src, src_offset_bytes, src_strides_bytes, shape, item_bytes)


def gather_box_crc(
    dst: NDArray[np.uint8],
    dst_offset_bytes: int,
    src: NDArray[np.uint8],
    src_offset_bytes: int,
    src_strides_bytes: Sequence[int],
    shape: Sequence[int],
    item_bytes: int,
    begin_bytes: int,
    end_bytes: int,
    stream_offset_bytes: int,
    block_bytes: int,
    block_crcs: NDArray[np.uint32],
) -> None:
    """Copies bytes of the flattened box to contiguous memory, extending the CRC of every block."""
    box = box_view(src, src_offset_bytes, src_strides_bytes, shape, item_bytes)
    piece = box.reshape(-1)[begin_bytes:end_bytes]
    dst[dst_offset_bytes : dst_offset_bytes + piece.size] = piece
    _extend(piece, stream_offset_bytes, block_bytes, block_crcs)


def scatter_box_crc(
    dst: NDArray[np.uint8],
    dst_offset_bytes: int,
    dst_strides_bytes: Sequence[int],
    src: NDArray[np.uint8],
    src_offset_bytes: int,
    src_strides_bytes: Sequence[int],
    shape: Sequence[int],
    item_bytes: int,
    begin_bytes: int,
    end_bytes: int,
    stream_offset_bytes: int,
    block_bytes: int,
    block_crcs: NDArray[np.uint32],
) -> None:
    """Copies a box, and extends the CRC of every block of a range of `src`."""
    copy_box(
        dst,
        dst_offset_bytes,
        dst_strides_bytes,
        src,
        src_offset_bytes,
        src_strides_bytes,
        shape,
        item_bytes,
    )
    _extend(src[begin_bytes:end_bytes], stream_offset_bytes, block_bytes, block_crcs)


def _extend(
    piece: NDArray[np.uint8],
    stream_offset_bytes: int,
    block_bytes: int,
    block_crcs: NDArray[np.uint32],
) -> None:
    at = 0
    while at < piece.size:
        block, in_block = divmod(stream_offset_bytes + at, block_bytes)
        taken = min(block_bytes - in_block, piece.size - at)
        block_crcs[block] = crc32c(piece[at : at + taken], int(block_crcs[block]))
        at += taken
