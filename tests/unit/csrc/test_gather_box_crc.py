"""One-pass gather and block checksums against NumPy and the byte-by-byte CRC."""

import itertools

import numpy as np
import pytest

from everstep.checkpoint import kernels, kernels_reference
from tests.support.boxes import ITEM_SIZES_BYTES, StridedBox, random_box, random_bytes, random_shape

MIB = 1 << 20


def flatten(box: StridedBox) -> np.ndarray:
    return kernels_reference.box_view(
        box.buffer, box.offset_bytes, box.strides_bytes, box.shape, box.item_bytes
    ).reshape(-1)


def gather(
    box: StridedBox, dst: np.ndarray, dst_offset: int, *rest: object, **options: int
) -> None:
    kernels.gather_box_crc(
        dst,
        dst_offset,
        box.buffer,
        box.offset_bytes,
        box.strides_bytes,
        box.shape,
        box.item_bytes,
        *rest,  # type: ignore[arg-type]
        **options,
    )


@pytest.mark.parametrize("seed", range(50))
def test_random_small_boxes_and_ranges(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(6):
        item_bytes = int(rng.choice(ITEM_SIZES_BYTES))
        box = random_box(
            rng, random_shape(rng, int(rng.integers(1, 1500))), item_bytes, as_source=True
        )
        begin, end = sorted(int(x) for x in rng.integers(0, box.total_bytes + 1, 2))
        block_bytes = int(rng.integers(1, 3000))
        position = int(rng.integers(0, 5000))
        dst_offset = int(rng.integers(0, 70))
        dst = random_bytes(rng, dst_offset + end - begin + int(rng.integers(0, 70)))
        expected_dst = dst.copy()
        crcs = np.zeros((position + end - begin) // block_bytes + 1, np.uint32)
        crcs[position // block_bytes] = rng.integers(0, 1 << 32)
        expected_crcs = crcs.copy()
        kernels_reference.gather_box_crc(
            expected_dst,
            dst_offset,
            box.buffer,
            box.offset_bytes,
            box.strides_bytes,
            box.shape,
            item_bytes,
            begin,
            end,
            position,
            block_bytes,
            expected_crcs,
        )
        threads = int(rng.integers(1, 3))
        gather(box, dst, dst_offset, begin, end, position, block_bytes, crcs, threads=threads)
        np.testing.assert_array_equal(dst, expected_dst)
        np.testing.assert_array_equal(crcs, expected_crcs)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["whole", "rows", "short rows", "items", "expanded", "reversed"])
def test_large_boxes(kind: str, threads: int) -> None:
    rng = np.random.default_rng(threads)
    strides, shape, item_bytes = {
        "whole": ((4,), (9 * MIB // 4,), 4),
        "rows": ((6004, 4), (1500, 1500), 4),
        "short rows": ((112, 4), (90_000, 25), 4),
        "items": ((6,), (9 * MIB // 2,), 2),
        "expanded": ((0, 4), (9, MIB // 4), 4),
        "reversed": ((-16, 2), (9 * MIB // 16, 8), 2),
    }[kind]
    offset = 16 * shape[0] - 16 if kind == "reversed" else 0
    box = StridedBox(random_bytes(rng, 28 * MIB), offset, strides, shape, item_bytes)
    total, position = box.total_bytes, MIB - 100
    dst = np.zeros(total + 3, np.uint8)
    crcs = np.zeros((position + total) // MIB + 1, np.uint32)
    gather(box, dst, 3, 0, total, position, MIB, crcs, threads=threads)
    np.testing.assert_array_equal(dst[3:], flatten(box))
    stream = np.concatenate([np.empty(position, np.uint8), dst[3:]])
    assert int(crcs[0]) == kernels.crc32c(stream[position:MIB])
    assert crcs[1:].tolist() == kernels.crc32c_blocks(stream[MIB:], MIB).tolist()


def test_consecutive_calls_are_one_stream() -> None:
    rng = np.random.default_rng(8)
    boxes = [
        random_box(rng, random_shape(rng, 4000), int(rng.choice(ITEM_SIZES_BYTES)), as_source=True)
        for _ in range(12)
    ]
    total = sum(box.total_bytes for box in boxes)
    block_bytes = 4096
    stream = np.zeros(total, np.uint8)
    crcs = np.zeros(-(-total // block_bytes), np.uint32)
    position = 0
    for box in boxes:
        cuts = sorted({0, box.total_bytes, *rng.integers(0, box.total_bytes + 1, 2).tolist()})
        for begin, end in itertools.pairwise(cuts):
            gather(box, stream, position, begin, end, position, block_bytes, crcs)
            position += end - begin
    assert position == total
    np.testing.assert_array_equal(stream, np.concatenate([flatten(box) for box in boxes]))
    np.testing.assert_array_equal(crcs, kernels.crc32c_blocks(stream, block_bytes))


def test_an_empty_range_changes_nothing() -> None:
    box = StridedBox(np.zeros(64, np.uint8), 0, (8, 1), (8, 8), 1)
    crcs = np.full(1, 7, np.uint32)
    dst = np.full(4, 7, np.uint8)
    gather(box, dst, 4, 10, 10, 1 << 40, 16, crcs)
    assert (dst == 7).all()
    assert crcs.tolist() == [7]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"begin": -1}, "bytes -1 to 64 are not a range of the box of 64 bytes"),
        ({"end": 65}, "bytes 0 to 65 are not a range"),
        ({"begin": 10, "end": 9}, "bytes 10 to 9 are not a range"),
        ({"dst_offset": 1}, "64 bytes at offset 1 do not fit into dst of 64 bytes"),
        ({"dst_offset": -1}, "64 bytes at offset -1 do not fit"),
        ({"dst_offset": 1 << 62}, "do not fit into dst"),
        ({"position": -1}, "the stream position -1 is out of range"),
        ({"position": (1 << 63) - 10}, "is out of range"),
        ({"position": 1}, "end in block 4 of the stream, but there is room for 4 checksums"),
        ({"position": 1 << 40}, "room for 4 checksums"),
        ({"block_bytes": 0}, "block_bytes is 0"),
        ({"threads": -1}, "threads is -1"),
        ({"offset": 1}, "needs bytes 1 to 65 of src"),
        ({"strides": (9, 1)}, "needs bytes 0 to 71 of src"),
        ({"strides": (8, 1, 1)}, "src has 3 strides for 2 dimensions"),
    ],
)
def test_arguments_out_of_bounds_are_refused(changes: dict[str, int], message: str) -> None:
    at: dict[str, object] = {"offset": 0, "strides": (8, 1), "begin": 0, "end": 64}
    at |= {"dst_offset": 0, "position": 0, "block_bytes": 16, "threads": 1}
    at |= changes
    dst, crcs = np.full(64, 7, np.uint8), np.full(4, 7, np.uint32)
    box = StridedBox(np.zeros(64, np.uint8), at["offset"], at["strides"], (8, 8), 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        gather(
            box,
            dst,
            at["dst_offset"],  # type: ignore[arg-type]
            at["begin"],
            at["end"],
            at["position"],
            at["block_bytes"],
            crcs,
            threads=at["threads"],  # type: ignore[arg-type]
        )
    assert (dst == 7).all()
    assert (crcs == 7).all()


def test_gathering_over_the_source_is_refused() -> None:
    buffer = np.zeros(100, np.uint8)
    box = StridedBox(buffer, 0, (1,), (50,), 1)
    with pytest.raises(ValueError, match="dst and src overlap in memory"):
        gather(box, buffer, 49, 0, 50, 0, 16, np.zeros(4, np.uint32))
