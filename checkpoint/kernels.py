"""Copies and checksums of bytes, in native code that releases the interpreter lock.

Every function has a slow twin of the same signature in `kernels_reference`. Byte buffers are
one-dimensional arrays of uint8; sources may be objects of bytes and read-only, as a mapped file is.
All arguments are checked before the first byte is touched: a ValueError says which one is wrong, a
TypeError that a buffer has another type or shape.

A *box* is an n-dimensional region of a buffer: an offset, one stride per dimension, a shape, an
item size, all but the shape in bytes. Strides may be negative, and zero in a source.

`EVERSTEP_PORTABLE_KERNELS=1` in the environment, read once at import, forces code that runs on any
processor; `EVERSTEP_AVX512_KERNELS=0` keeps AVX-512 unused.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from everstep import _native

# What can be read: an array of uint8, or an object of bytes.
ByteSource = bytes | bytearray | memoryview | NDArray[np.uint8]


def implementations() -> dict[str, str]:
    """Which implementation each kernel uses on this machine, by kernel name."""
    return _native.kernels()


def crc32c(data: ByteSource, seed: int = 0) -> int:
    """CRC-32C of the bytes, continuing from `seed`, the CRC of the bytes before them.

    RFC 3720, appendix B.4; crc32c(b"123456789") is 0xE3069283.
    """
    return _native.crc32c(data, seed)


def crc32c_combine(crc_a: int, crc_b: int, bytes_b: int) -> int:
    """CRC-32C of A followed by B, from both CRCs and the length of B in bytes."""
    return _native.crc32c_combine(crc_a, crc_b, bytes_b)


def crc32c_blocks(
    data: ByteSource,
    block_bytes: int,
    *,
    out: NDArray[np.uint32] | None = None,
    threads: int = 1,
) -> NDArray[np.uint32]:
    """One CRC-32C per block of `block_bytes`; the last block may be short.

    Returns `out`, or a new array when it is None. At most `threads` threads work, fewer when the
    data is small.
    """
    if out is None:
        out = np.empty(-(-len(data) // max(block_bytes, 1)), np.uint32)
    _native.crc32c_blocks(data, block_bytes, out, threads)
    return out


def copy_box(
    dst: NDArray[np.uint8],
    dst_offset_bytes: int,
    dst_strides_bytes: Sequence[int],
    src: ByteSource,
    src_offset_bytes: int,
    src_strides_bytes: Sequence[int],
    shape: Sequence[int],
    item_bytes: int,
    *,
    threads: int = 1,
) -> None:
    """Copies a box of `shape` items of `item_bytes` each from `src` to `dst`.

    Offsets are those of the item with index zero in every dimension. The two boxes must not overlap
    in memory, items of `dst` must not overlap each other. Copies of some size go around the
    caches where rows are long enough: what is copied is taken to be part of a large state.
    """
    _native.copy_box(
        dst,
        dst_offset_bytes,
        dst_strides_bytes,
        src,
        src_offset_bytes,
        src_strides_bytes,
        shape,
        item_bytes,
        threads,
    )


def gather_box_crc(
    dst: NDArray[np.uint8],
    dst_offset_bytes: int,
    src: ByteSource,
    src_offset_bytes: int,
    src_strides_bytes: Sequence[int],
    shape: Sequence[int],
    item_bytes: int,
    begin_bytes: int,
    end_bytes: int,
    stream_offset_bytes: int,
    block_bytes: int,
    block_crcs: NDArray[np.uint32],
    *,
    threads: int = 1,
) -> None:
    """Copies part of a box to contiguous memory and checksums it in the same pass.

    Bytes [begin_bytes, end_bytes) of the C-order flattening of the box in `src` go to
    `dst[dst_offset_bytes:]`. They are bytes `stream_offset_bytes` and following of a stream cut
    into blocks of `block_bytes`: `block_crcs[i]`, the CRC-32C of block i so far (0 for none), is
    extended for every block they fall into, so calls in the order of the stream leave the CRC of
    every block. The range may begin and end inside an item.

    Threads divide whole blocks among them.
    """
    _native.gather_box_crc(
        dst,
        dst_offset_bytes,
        src,
        src_offset_bytes,
        src_strides_bytes,
        shape,
        item_bytes,
        begin_bytes,
        end_bytes,
        stream_offset_bytes,
        block_bytes,
        block_crcs,
        threads,
    )


def scatter_box_crc(
    dst: NDArray[np.uint8],
    dst_offset_bytes: int,
    dst_strides_bytes: Sequence[int],
    src: ByteSource,
    src_offset_bytes: int,
    src_strides_bytes: Sequence[int],
    shape: Sequence[int],
    item_bytes: int,
    begin_bytes: int,
    end_bytes: int,
    stream_offset_bytes: int,
    block_bytes: int,
    block_crcs: NDArray[np.uint32],
    *,
    threads: int = 1,
) -> None:
    """Copies a box as `copy_box` does and checksums a range of `src` in the same pass.

    All of `src[begin_bytes:end_bytes]` is checksummed, also what is not part of the box: these are
    bytes `stream_offset_bytes` and following of a stream cut into blocks of `block_bytes`, of which
    `block_crcs[i]` is the CRC-32C of block i so far (0 for none). What of the box is outside of the
    range is only copied. An empty box leaves a checksum, an empty range a copy.

    One pass it is where source strides are those of memory order, none of them negative, unless
    that would write single items far from each other, as into a transposed array; otherwise two.
    Threads divide whole blocks among them.
    """
    _native.scatter_box_crc(
        dst,
        dst_offset_bytes,
        dst_strides_bytes,
        src,
        src_offset_bytes,
        src_strides_bytes,
        shape,
        item_bytes,
        begin_bytes,
        end_bytes,
        stream_offset_bytes,
        block_bytes,
        block_crcs,
        threads,
    )


def pages_missing(data: ByteSource) -> bool:
    """Whether some pages of a mapped file are not in the page cache, judged by one of each MiB.

    The kernel tells this (mincore) only who owns the file or may write it, from Linux 5.2 on:
    others hear that all pages are there.
    """
    return _native.pages_missing(data)


def populate_pages(data: ByteSource, *, told: bool) -> int:
    """Brings pages of a mapped file into the page cache, and returns the error number, 0 for none.

    Whoever then reads the bytes meets no error of the device, which would be a signal. EINVAL means
    that the kernel cannot do it (MADV_POPULATE_READ came with Linux 5.14). `told` is whether the
    kernel says the truth about which pages are missing: see `pages_missing`.
    """
    return _native.populate_pages(data, told)
