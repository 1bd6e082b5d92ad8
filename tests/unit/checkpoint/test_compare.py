"""Comparing checkpoints: every difference is found and measured, whatever the layouts are."""

import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everstep.checkpoint import compare
from everstep.checkpoint.compare import (
    Comparison,
    Differences,
    ObjectDifference,
    compare_steps,
    differences,
    object_differences,
)
from everstep.checkpoint.digest import digest_step
from everstep.checkpoint.layout import TensorSpec
from tests.support.stored import SAFETENSORS_NAMES, Array, saved_reader

RNG = np.random.default_rng(11)


def between(a: Array, b: Array, atol: float | None = None, **dtypes: str) -> Differences:
    """The differences of two arrays; their dtypes, or those that their bits stand for."""
    first, second = (
        TensorSpec("t", dtypes.get(key) or SAFETENSORS_NAMES[array.dtype.name], array.shape)
        for key, array in (("first", a), ("second", b))
    )
    bits_a, bits_b = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    return differences(first, bits_a, second, bits_b, atol)


@pytest.mark.parametrize("dtype", ["<f8", "<f4", "<f2"])
def test_floats(dtype: str) -> None:
    a = np.array([1, 2, 3, math.inf, math.nan, 0, 5], dtype)
    b = np.array([1, 2.5, 1, math.inf, math.nan, 0, 5], dtype)
    assert between(a, a.copy()) == Differences()
    assert between(a, b) == Differences(2, 0, 2.0)
    assert between(a, b, atol=0.5) == Differences(1, 0, 2.0)
    assert between(a, b, atol=2) == Differences()


def test_nan_infinity_and_signed_zero() -> None:
    one = np.array([math.nan, math.inf, math.inf, 0.0, 1.0], np.float32)
    two = np.array([1.0, 1.0, -math.inf, -0.0, 1.5], np.float32)
    assert between(one, two) == Differences(5, 1, math.inf)
    assert between(one, two, atol=0.0) == Differences(4, 1, math.inf)
    assert between(one[3:], two[3:], atol=1.0) == Differences()
    bits = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert between(bits[:1], bits[1:]) == Differences(1, 1, 0)
    assert between(bits[:1], bits[1:], atol=0.0) == Differences()


def test_integers_are_exact() -> None:
    a = np.array([2**63 - 1, -(2**63), 5], np.int64)
    b = np.array([-(2**63), 2**63 - 1, 5], np.int64)
    assert between(a, b) == Differences(2, 0, 2**64 - 1)
    small = np.array([0, 255], np.uint8)
    assert between(small, small[::-1]) == Differences(2, 0, 255)
    flags = np.array([True, False])
    assert between(flags, np.array([True, True])) == Differences(1, 0, 1)


def test_complex_numbers() -> None:
    a = np.array([3 + 4j, 1, complex(math.nan, 0)], np.complex64)
    b = np.array([0, 1, 2], np.complex64)
    assert between(a, b) == Differences(2, 1, 5.0)


def test_types_that_numpy_lacks() -> None:
    one, two = np.array([0x3F80, 0x4000], np.uint16), np.array([0x3F80, 0x4040], np.uint16)
    assert between(one, two, first="BF16", second="BF16") == Differences(1, 0, 1.0)
    eight, nine = np.array([0x38, 0x7F], np.uint8), np.array([0x40, 0x7F], np.uint8)
    assert between(eight, nine, first="F8_E4M3", second="F8_E4M3") == Differences(1, 0, 1.0)


def test_another_dtype_is_compared_by_its_numbers() -> None:
    a = np.array([1.0, 2.0, 3.1, math.nan], np.float32)
    b = np.array([0x3F80, 0x4000, 0x4046, 0x7FC0], np.uint16)  # 3.09375
    found = between(a, b, second="BF16")
    assert (found.elements, found.nans) == (1, 0)
    assert math.isclose(found.largest, 3.1 - 3.09375, rel_tol=1e-4)
    assert between(a, b, atol=0.01, second="BF16") == Differences()


def test_objects_differ_where_their_smallest_parts_do() -> None:
    a = {"data": {"epoch": 1, "at": [1, 2, 3]}, "old": None, "same": {"x": []}, "n": 1}
    b = {"data": {"epoch": 2, "at": [1, 5, 3]}, "same": {"x": []}, "n": 1.0, "new": [1]}
    assert list(object_differences(a, b)) == [
        ObjectDifference("data.at[1]", "2", "5"),
        ObjectDifference("data.epoch", "1", "2"),
        ObjectDifference("n", "1", "1.0"),
        ObjectDifference("new", None, "[1]"),
        ObjectDifference("old", "null", None),
    ]
    assert list(object_differences(a, dict(reversed(a.items())))) == []


def arrays() -> dict[str, Array]:
    return {
        "a": RNG.standard_normal((40, 30)).astype(np.float32),
        "b": RNG.integers(0, 9, (5, 6, 7)),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(3.0),
    }


def compared(tmp_path: Path, first: dict[str, Array], second: dict[str, Array]) -> Comparison:
    """First as one pack, second cut into boxes in eight packs."""
    bounds: dict[str, Any] = {"a": [(7, 8, 33), (11,)], "b": [(1,), (), (2, 5)]}
    done: list[int] = []
    with (
        saved_reader(tmp_path / "1", first, objects={"x": 1}) as one,
        saved_reader(tmp_path / "2", second, bounds=bounds, world_size=8, objects={"x": 2}) as two,
    ):
        names = {*first, *second} - {"left out"}
        found = compare_steps(one, two, names=names, on_bytes=done.append)
    assert done == sorted(done)
    assert done[-1] <= sum(array.nbytes for array in first.values())
    return found


def test_equal_states_in_two_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "PIECE_BYTES", 256)
    monkeypatch.setattr(compare, "_CHUNK_ITEMS", 10)
    state = arrays()
    found = compared(tmp_path, state, state)
    assert [t.first.name for t in found.tensors] == sorted(state)
    assert all(t.equal for t in found.tensors)
    assert found.objects == (ObjectDifference("x", "1", "2"),)
    assert not found.equal


def test_memory_is_bounded(tmp_path: Path) -> None:
    large = np.arange(6 * 2**20, dtype=np.float32)
    with (
        saved_reader(tmp_path / "1", {"a": large}) as one,
        saved_reader(tmp_path / "2", {"a": large + 1}) as two,
    ):
        del large
        tracemalloc.start()
        try:
            (found,) = compare_steps(one, two, names=["a"]).tensors
            digest_step(one)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert found.differences == Differences(6 * 2**20, 0, 1.0)
    assert peak_bytes < 32 * 2**20


def test_every_kind_of_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "PIECE_BYTES", 256)
    monkeypatch.setattr(compare, "_CHUNK_ITEMS", 10)
    first, second = arrays() | {"gone": np.zeros(3)}, arrays() | {"new": np.zeros(4)}
    second["a"] = first["a"].copy()
    second["a"][[0, 20, 39], [0, 17, 29]] += np.float32(4)
    second["b"] = first["b"][:, :5]
    second["empty"] = first["empty"].astype(np.float64)
    second["left out"] = np.ones(1)
    found = compared(tmp_path, first, second)
    assert (found.only_first, found.only_second) == (("gone",), ("new",))
    a, b, empty, scalar = found.tensors
    assert a.differences is not None
    assert (a.differences.elements, a.equal) == (3, False)
    assert math.isclose(a.differences.largest, 4, rel_tol=1e-5)
    assert (b.differences, b.equal) == (None, False)
    assert (empty.differences, empty.equal) == (Differences(), False)
    assert scalar.equal
