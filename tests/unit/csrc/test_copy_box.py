"""Strided box copies against NumPy."""

import mmap
from pathlib import Path

import numpy as np
import pytest

from everstep.checkpoint import kernels, kernels_reference
from tests.support.boxes import ITEM_SIZES_BYTES, StridedBox, random_box, random_bytes, random_shape

MIB = 1 << 20


def assert_copies_like_the_reference(dst: StridedBox, src: StridedBox, threads: int) -> None:
    expected = dst.buffer.copy()
    arguments = (dst.offset_bytes, dst.strides_bytes, src.buffer, src.offset_bytes)
    arguments += (src.strides_bytes, src.shape, src.item_bytes)
    kernels_reference.copy_box(expected, *arguments)
    kernels.copy_box(dst.buffer, *arguments, threads=threads)
    np.testing.assert_array_equal(dst.buffer, expected)


@pytest.mark.parametrize("seed", range(50))
def test_random_small_boxes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(10):
        item_bytes = int(rng.choice(ITEM_SIZES_BYTES))
        shape = random_shape(rng, int(rng.integers(1, 3000)))
        src = random_box(rng, shape, item_bytes, as_source=True)
        dst = random_box(rng, shape, item_bytes, as_source=False)
        assert_copies_like_the_reference(dst, src, int(rng.integers(1, 3)))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("row_bytes", [100, 1500, 4096, 70_001])
def test_large_boxes_with_gaps(row_bytes: int, threads: int) -> None:
    rng = np.random.default_rng(row_bytes)
    shape = (9 * MIB // row_bytes, row_bytes)
    for src_gap, dst_gap in ((0, 0), (3, 0), (0, 64), (28, 5)):
        boxes = [
            StridedBox(
                random_bytes(rng, shape[0] * (row_bytes + gap)), 0, (row_bytes + gap, 1), shape, 1
            )
            for gap in (dst_gap, src_gap)
        ]
        assert_copies_like_the_reference(boxes[0], boxes[1], threads)


def test_large_copies_of_every_item_size_and_alignment() -> None:
    rng = np.random.default_rng(3)
    for item_bytes in ITEM_SIZES_BYTES:
        shape = (5, 3 * MIB // (5 * item_bytes))
        src = random_box(rng, shape, item_bytes, as_source=True)
        dst = random_box(rng, shape, item_bytes, as_source=False)
        assert_copies_like_the_reference(dst, src, 1)


def test_boxes_of_equal_but_unusual_order_become_one_copy() -> None:
    rng = np.random.default_rng(4)
    shape, strides = (40, 50, 60), (4, 160, 8000)  # Fortran order on both sides
    src = StridedBox(random_bytes(rng, 480_000), 0, strides, shape, 4)
    dst = StridedBox(random_bytes(rng, 480_000), 0, strides, shape, 4)
    assert_copies_like_the_reference(dst, src, 1)
    np.testing.assert_array_equal(dst.buffer, src.buffer)


def test_a_read_only_mapped_file_is_a_source(tmp_path: Path) -> None:
    path = tmp_path / "data"
    data = random_bytes(np.random.default_rng(5), 3 * MIB)
    path.write_bytes(data.tobytes())
    dst = np.zeros(data.size, np.uint8)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        source = np.frombuffer(mapped, np.uint8)
        assert not source.flags.writeable
        kernels.copy_box(dst, 0, (1,), source, 0, (1,), (data.size,), 1)
        del source
    np.testing.assert_array_equal(dst, data)
    memmap = np.memmap(path, np.uint8, "r")
    kernels.copy_box(dst, 1, (1,), memmap, 0, (1,), (data.size - 1,), 1)
    np.testing.assert_array_equal(dst[1:], data[:-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (9, 8)}, "needs bytes 0 to 72 of dst"),
        ({"src_offset_bytes": 25}, "needs bytes 25 to 65 of src"),
        ({"src_strides_bytes": (-8, 1)}, "needs bytes -32 to 8 of src"),
        ({"src_offset_bytes": -1}, "the offset -1 is outside src of 64 bytes"),
        ({"dst_offset_bytes": 65}, "the offset 65 is outside dst of 64 bytes"),
        ({"shape": (0, 8), "dst_offset_bytes": 65}, "the offset 65 is outside dst"),
        ({"src_strides_bytes": (8,)}, "src has 1 strides for 2 dimensions"),
        ({"shape": (5, -1)}, "the shape holds -1"),
        ({"item_bytes": 0}, "item_bytes is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"dst_strides_bytes": (0, 1)}, "elements of dst overlap"),
        ({"dst_strides_bytes": (7, 1)}, "elements of dst overlap"),
        ({"shape": (1 << 40, 1 << 40)}, "more than 2\\^63 bytes"),
        ({"src_strides_bytes": (1 << 62, 1)}, "more than 2\\^63 bytes in src"),
        ({"shape": (1,) * 65, "src_strides_bytes": (1,) * 65}, "dst has 2 strides for 65"),
    ],
)
def test_arguments_out_of_bounds_are_refused(changes: dict[str, object], message: str) -> None:
    dst, src = np.full(64, 7, np.uint8), np.zeros(64, np.uint8)
    arguments: dict[str, object] = {
        "dst_offset_bytes": 0,
        "dst_strides_bytes": (8, 1),
        "src_offset_bytes": 0,
        "src_strides_bytes": (8, 1),
        "shape": (5, 8),
        "item_bytes": 1,
    }
    arguments |= changes
    with pytest.raises(ValueError, match=message):
        kernels.copy_box(dst=dst, src=src, **arguments)  # type: ignore[arg-type]
    assert (dst == 7).all()


def test_more_dimensions_than_supported_are_refused() -> None:
    many = (1,) * 65
    with pytest.raises(ValueError, match="65 dimensions; at most 64"):
        kernels.copy_box(np.zeros(1, np.uint8), 0, many, bytes(1), 0, many, many, 1)


def test_overlapping_memory_is_refused() -> None:
    buffer = np.arange(100, dtype=np.uint8)
    with pytest.raises(ValueError, match="dst and src overlap in memory"):
        kernels.copy_box(buffer, 0, (1,), buffer, 49, (1,), (50,), 1)
    kernels.copy_box(buffer, 0, (1,), buffer, 50, (1,), (50,), 1)
    np.testing.assert_array_equal(buffer[:50], buffer[50:])


def test_a_read_only_destination_is_refused() -> None:
    dst = np.zeros(4, np.uint8)
    dst.flags.writeable = False
    with pytest.raises(TypeError, match="copy_box"):
        kernels.copy_box(dst, 0, (1,), bytes(4), 0, (1,), (4,), 1)
