"""CRC-32C against published vectors and the byte-by-byte reference."""

import sys
import threading

import numpy as np
import pytest

from everstep.checkpoint import kernels, kernels_reference
from tests.support.boxes import random_bytes

MIB = 1 << 20


@pytest.mark.parametrize(
    ("data", "expected"),
    [  # the first from the catalogue of CRCs, the others from RFC 3720, appendix B.4
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"", 0),
    ],
)
def test_known_vectors(data: bytes, expected: int) -> None:
    array = np.frombuffer(data, np.uint8)
    assert kernels.crc32c(array) == expected
    assert kernels.crc32c(data) == expected
    assert kernels_reference.crc32c(array) == expected


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_reference_at_any_length_alignment_and_start(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for limit in (30, 300, 1500, 9000):
        data = random_bytes(rng, int(rng.integers(0, limit)))
        before = int(rng.integers(0, 1 << 32))
        assert kernels.crc32c(data, before) == kernels_reference.crc32c(data, before)


def test_continues_from_the_bytes_before() -> None:
    data = random_bytes(np.random.default_rng(0), 100_000)
    whole = kernels.crc32c(data)
    for cut in (0, 1, 63, 3072, 50_001, data.size):
        assert kernels.crc32c(data[cut:], kernels.crc32c(data[:cut])) == whole


@pytest.mark.parametrize("bytes_b", [0, 1, 7, 4096, 12_345])
def test_combine_equals_the_crc_of_both(bytes_b: int) -> None:
    rng = np.random.default_rng(bytes_b)
    a, b = random_bytes(rng, 999), random_bytes(rng, bytes_b)
    crc_a, crc_b = kernels.crc32c(a), kernels.crc32c(b)
    expected = kernels.crc32c(np.concatenate([a, b]))
    assert kernels.crc32c_combine(crc_a, crc_b, bytes_b) == expected
    assert kernels_reference.crc32c_combine(crc_a, crc_b, bytes_b) == expected


def test_combine_takes_lengths_past_four_gibibytes() -> None:
    zeros = kernels.crc32c(bytes(MIB))
    crc, length = zeros, MIB
    while length < 1 << 34:
        crc, length = kernels.crc32c_combine(crc, crc, length), 2 * length
    in_steps = 0
    for _ in range(length // (1 << 30)):
        gibibyte = zeros
        for doubling in range(10):
            gibibyte = kernels.crc32c_combine(gibibyte, gibibyte, MIB << doubling)
        in_steps = kernels.crc32c_combine(in_steps, gibibyte, 1 << 30)
    assert in_steps == crc


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("size", "block"), [(0, 8), (1, 8), (1000, 100), (1001, 100), (99, 100)])
def test_blocks_equal_the_reference(size: int, block: int, threads: int) -> None:
    data = random_bytes(np.random.default_rng(size), size)
    crcs = kernels.crc32c_blocks(data, block, threads=threads)
    assert crcs.dtype == np.uint32
    np.testing.assert_array_equal(crcs, kernels_reference.crc32c_blocks(data, block))


def test_blocks_of_large_data_on_threads_into_a_given_array() -> None:
    data = random_bytes(np.random.default_rng(1), 9 * MIB + 5)
    out = np.full(10, 7, np.uint32)
    assert kernels.crc32c_blocks(data, MIB, out=out, threads=2) is out
    assert out.tolist() == [kernels.crc32c(data[i * MIB : (i + 1) * MIB]) for i in range(10)]


@pytest.mark.parametrize(
    ("block_bytes", "out_size", "threads", "message"),
    [
        (0, 1, 1, "block_bytes is 0"),
        (-4, 1, 1, "block_bytes is -4"),
        (4, 2, 1, "the data has 3 blocks of 4 bytes"),
        (4, 4, 1, "room for 4 checksums"),
        (4, 3, 0, "threads is 0"),
    ],
)
def test_blocks_refuse_what_makes_no_sense(
    block_bytes: int, out_size: int, threads: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.crc32c_blocks(
            bytes(10), block_bytes, out=np.empty(out_size, np.uint32), threads=threads
        )


def test_other_types_are_refused_rather_than_copied() -> None:
    floats = np.zeros(4, np.float32)
    with pytest.raises(TypeError, match="crc32c"):
        kernels.crc32c(floats)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="crc32c"):
        kernels.crc32c(np.zeros(8, np.uint8)[::2])
    read_only = np.zeros(1, np.uint32)
    read_only.flags.writeable = False
    with pytest.raises(TypeError, match="crc32c_blocks"):
        kernels.crc32c_blocks(bytes(10), 10, out=read_only)


def test_the_interpreter_runs_on_meanwhile() -> None:
    data = np.zeros(64 * MIB, np.uint8)
    interval_s = sys.getswitchinterval()
    # Nobody takes the lock by force now: this thread can only see the call in progress when the
    # call has given the lock away.
    sys.setswitchinterval(1000.0)
    try:
        for _ in range(20):
            done: list[int] = []
            worker = threading.Thread(target=lambda done=done: done.append(kernels.crc32c(data)))
            worker.start()
            seen_running = not done
            worker.join()
            assert len(done) == 1
            if seen_running:
                return
    finally:
        sys.setswitchinterval(interval_s)
    pytest.fail("the interpreter stood still during the checksum")
