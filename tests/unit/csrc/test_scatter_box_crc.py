"""One-pass copies out of a checksummed stream against NumPy and the byte-by-byte CRC."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from everstep.checkpoint import kernels, kernels_reference
from tests.support.boxes import ITEM_SIZES_BYTES, StridedBox, random_box, random_bytes, random_shape

MIB = 1 << 20


def scatter(
    dst: StridedBox, src: StridedBox, begin: int, end: int, position: int, block_bytes: int,
    crcs: NDArray[np.uint32], threads: int,
) -> None:  # fmt: skip
    kernels.scatter_box_crc(
        dst.buffer, dst.offset_bytes, dst.strides_bytes,
        src.buffer, src.offset_bytes, src.strides_bytes, src.shape, src.item_bytes,
        begin, end, position, block_bytes, crcs, threads=threads,
    )  # fmt: skip


def assert_scatters_like_the_reference(
    rng: np.random.Generator, dst: StridedBox, src: StridedBox, block_bytes: int, calls: int
) -> None:
    """Several calls in the order of the stream; the first copies the box, the others nothing."""
    size = src.buffer.size
    cuts = np.sort(rng.integers(0, size + 1, calls + 1)).tolist()
    if rng.random() < 0.3:
        cuts[0], cuts[-1] = 0, size
    position = int(rng.integers(0, 2 * block_bytes))
    crcs = np.zeros((position + size) // block_bytes + 1, np.uint32)
    crcs[position // block_bytes] = rng.integers(0, 1 << 32)
    expected_crcs, expected = crcs.copy(), dst.buffer.copy()
    nothing = StridedBox(np.empty(0, np.uint8), 0, (1,), (0,), 1)
    for call, (begin, end) in enumerate(itertools.pairwise(cuts)):
        threads = int(rng.integers(1, 4))
        into, box = (dst, src) if call == 0 else (nothing, StridedBox(src.buffer, 0, (1,), (0,), 1))
        scatter(into, box, begin, end, position, block_bytes, crcs, threads)
        kernels_reference.scatter_box_crc(
            expected if call == 0 else nothing.buffer, into.offset_bytes, into.strides_bytes,
            box.buffer, box.offset_bytes, box.strides_bytes, box.shape, box.item_bytes,
            begin, end, position, block_bytes, expected_crcs,
        )  # fmt: skip
        position += end - begin
    np.testing.assert_array_equal(dst.buffer, expected)
    np.testing.assert_array_equal(crcs, expected_crcs)


@given(st.integers(0, 2**32 - 1))
def test_random_small_boxes_and_ranges(seed: int) -> None:
    rng = np.random.default_rng(seed)
    item_bytes = int(rng.choice(ITEM_SIZES_BYTES))
    shape = random_shape(rng, int(rng.integers(1, 1500)))
    src = random_box(rng, shape, item_bytes, as_source=True)
    dst = random_box(rng, shape, item_bytes, as_source=False)
    assert_scatters_like_the_reference(rng, dst, src, int(rng.integers(1, 3000)), 3)


def sub_box(
    rng: np.random.Generator, cell: tuple[int, ...], shape: tuple[int, ...], item_bytes: int
) -> StridedBox:
    """A box somewhere in a dense cell, which lies somewhere in a stream."""
    strides = [int(item_bytes * np.prod(cell[dim + 1 :])) for dim in range(len(cell))]
    start = int(rng.integers(0, 200))
    corner = [int(rng.integers(0, n - m + 1)) for n, m in zip(cell, shape, strict=True)]
    offset = start + sum(i * s for i, s in zip(corner, strides, strict=True))
    stream = random_bytes(rng, start + cell[0] * strides[0] + int(rng.integers(0, 200)))
    return StridedBox(stream, offset, tuple(strides), shape, item_bytes)


def expected_crcs(data: NDArray[np.uint8], position: int, block_bytes: int) -> list[int]:
    edges = [0, *range(block_bytes - position % block_bytes, data.size, block_bytes), data.size]
    return [kernels.crc32c(data[a:b]) for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("cell", "shape"),
    [
        ((4 * MIB,), (4 * MIB - 77,)),  # contiguous
        ((900, 3, 1536), (898, 2, 1536)),  # rows that are checksummed while they are copied
        ((2600, 800), (2600, 400)),  # rows that go around the caches
        ((2600, 801), (2599, 47)),
        ((50, 60, 700), (49, 59, 1)),  # single items
        ((3, 2, 400_000), (2, 1, 300_001)),
    ],
)
@pytest.mark.parametrize("order", ["same", "transposed", "gaps"])
def test_large_boxes(
    cell: tuple[int, ...], shape: tuple[int, ...], order: str, threads: int
) -> None:
    rng = np.random.default_rng(7)
    src = sub_box(rng, cell, shape, 4)
    if order == "transposed":
        strides = [int(4 * np.prod(shape[:dim])) for dim in range(len(shape))]
    else:
        gap = 24 if order == "gaps" else 0
        strides = [4] * len(shape)
        for dim in range(len(shape) - 1, 0, -1):
            strides[dim - 1] = strides[dim] * shape[dim] + gap
    dst_bytes = 4 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 80
    dst = StridedBox(np.zeros(dst_bytes, np.uint8), 16, tuple(strides), shape, 4)
    wanted = np.zeros_like(dst.buffer)
    kernels_reference.copy_box(
        wanted, 16, strides, src.buffer, src.offset_bytes, src.strides_bytes, shape, 4
    )
    begin, end = int(rng.integers(0, MIB)), src.buffer.size - int(rng.integers(0, MIB))
    for position, first, last in ((0, 0, src.buffer.size), (MIB + 5, begin, end)):
        dst.buffer[:] = 0
        blocks = (position + last - first - 1) // MIB + 1
        crcs = np.zeros(blocks, np.uint32)
        scatter(dst, src, first, last, position, MIB, crcs, threads)
        np.testing.assert_array_equal(dst.buffer, wanted)
        found = crcs[position // MIB :].tolist()
        assert found == expected_crcs(src.buffer[first:last], position, MIB)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (9, 8)}, "needs bytes 0 to 72 of dst"),
        ({"src_offset_bytes": 25}, "needs bytes 25 to 65 of src"),
        ({"dst_strides_bytes": (7, 1)}, "elements of dst overlap"),
        ({"begin_bytes": -1}, "bytes -1 to 64 are not a range of src of 64 bytes"),
        ({"begin_bytes": 9, "end_bytes": 8}, "bytes 9 to 8 are not a range"),
        ({"end_bytes": 65}, "bytes 0 to 65 are not a range of src of 64 bytes"),
        ({"stream_offset_bytes": -1}, "the stream position -1 is out of range"),
        ({"stream_offset_bytes": 2**63 - 8}, "the stream position .* is out of range"),
        ({"stream_offset_bytes": 17}, "end in block 5 of the stream, .* room for 5 checksums"),
        ({"block_bytes": 0}, "block_bytes is 0"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(changes: dict[str, object], message: str) -> None:
    dst, src, crcs = np.full(64, 7, np.uint8), np.zeros(64, np.uint8), np.full(5, 9, np.uint32)
    arguments: dict[str, object] = {
        "dst_offset_bytes": 0, "dst_strides_bytes": (8, 1), "src_offset_bytes": 0,
        "src_strides_bytes": (8, 1), "shape": (5, 8), "item_bytes": 1, "begin_bytes": 0,
        "end_bytes": 64, "stream_offset_bytes": 16, "block_bytes": 16, "block_crcs": crcs,
    }  # fmt: skip
    arguments |= changes
    with pytest.raises(ValueError, match=message):
        kernels.scatter_box_crc(dst=dst, src=src, **arguments)  # type: ignore[arg-type]
    assert (dst == 7).all()
    assert (crcs == 9).all()


def test_memory_that_overlaps_the_checksummed_range_is_refused() -> None:
    buffer, crcs = np.arange(100, dtype=np.uint8), np.zeros(1, np.uint32)
    for box, begin, end in ((49, 60, 100), (60, 49, 100)):
        with pytest.raises(ValueError, match="dst and src overlap in memory"):
            kernels.scatter_box_crc(
                buffer, 10, (1,), buffer, box, (1,), (40,), 1, begin, end, 0, 100, crcs
            )
    kernels.scatter_box_crc(buffer, 0, (1,), buffer, 60, (1,), (40,), 1, 50, 100, 0, 100, crcs)
    np.testing.assert_array_equal(buffer[:40], buffer[60:])
