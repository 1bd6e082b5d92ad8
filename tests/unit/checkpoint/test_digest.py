"""The digest: fast and slow agree, layouts do not matter, and any change of a value does."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.checkpoint import digest as digest_module
from everstep.checkpoint.digest import box_digest, box_digest_reference, combine, digest_step
from everstep.checkpoint.layout import ITEM_BYTES, Box, TensorSpec
from everstep.checkpoint.pieces import pieces
from tests.support.stored import cut, saved_reader

RNG = np.random.default_rng(3)


def random_tensor(dtype: str, shape: tuple[int, ...]) -> tuple[TensorSpec, np.ndarray]:
    """A tensor and its bytes, with one axis more for the bytes of an item."""
    spec = TensorSpec("t", dtype, shape)
    return spec, RNG.integers(0, 256, (*shape, spec.item_bytes), dtype=np.uint8)


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_the_fast_digest_is_the_slow_one(dtype: str) -> None:
    spec, data = random_tensor(dtype, (7, 5, 3))
    box = Box((2, 1, 0), (4, 3, 3))
    part = np.ascontiguousarray(data[2:6, 1:4]).reshape(-1)
    assert box_digest(spec, box, part) == box_digest_reference(spec, box, part)


def test_the_digest_is_what_its_description_says() -> None:
    def mix(z: int) -> int:
        z %= 2**64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    values = np.array([[1, 2**40], [3, 4]], "<u8")
    expected = sum(
        mix(mix(index + 0x9E3779B97F4A7C15) ^ bits)
        for index, bits in enumerate(values.reshape(-1).tolist())
    )
    spec = TensorSpec("t", "U64", (2, 2))
    assert box_digest(spec, spec.whole, values.reshape(-1).view(np.uint8)) == expected
    assert mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # the first number of SplitMix64(0)


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[tuple[int, ...], list[list[int]], int]:
    """A shape, inner boundaries per dim, and a number of items per chunk."""
    shape = tuple(draw(st.lists(st.integers(1, 9), max_size=4)))
    bounds = [sorted(draw(st.sets(st.integers(1, n - 1)))) if n > 1 else [] for n in shape]
    return shape, bounds, draw(st.integers(1, 40))


@settings(deadline=None)
@given(cut_tensors(), st.sampled_from(["F32", "BF16", "I64", "BOOL"]))
def test_any_cutting_into_boxes_gives_the_same_digest(
    case: tuple[tuple[int, ...], list[list[int]], int], dtype: str
) -> None:
    shape, bounds, chunk = case
    spec, data = random_tensor(dtype, shape)
    whole = box_digest_reference(spec, spec.whole, data.reshape(-1))
    total = 0
    for box in reversed(cut(shape, bounds)):
        for piece in pieces(box, chunk):
            index = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))
            total += box_digest(spec, piece, np.ascontiguousarray(data[index]).reshape(-1))
    assert total % 2**128 == whole


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, data = random_tensor("F32", (11, 13))
    expected = box_digest(spec, spec.whole, data.reshape(-1))
    monkeypatch.setattr(digest_module, "_CHUNK_ITEMS", 5)
    assert box_digest(spec, spec.whole, data.reshape(-1)) == expected


def test_every_bit_and_every_place_counts() -> None:
    spec, data = random_tensor("U8", (40,))
    flat = data.reshape(-1)
    seen = {box_digest(spec, spec.whole, flat)}
    for item in range(40):
        for bit in range(8):
            flat[item] ^= 1 << bit
            seen.add(box_digest(spec, spec.whole, flat))
            flat[item] ^= 1 << bit
    assert len(seen) == 1 + 40 * 8
    swapped = flat.copy()
    first, second = 0, int(np.flatnonzero(flat != flat[0])[0])
    swapped[[first, second]] = flat[[second, first]]
    assert box_digest(spec, spec.whole, swapped) not in seen


def test_sums_wrap_at_128_bits() -> None:
    spec = TensorSpec("t", "U8", (1,))
    assert combine({spec: 2**128 + 5}, {}).tensors == {"t": f"{5:032x}"}


def test_names_dtypes_shapes_and_objects_count() -> None:
    specs = [
        TensorSpec("a", "U8", (6,)),
        TensorSpec("b", "U8", (6,)),
        TensorSpec("a", "I8", (6,)),
        TensorSpec("a", "U8", (2, 3)),
    ]
    assert len({combine({spec: 1}, {}).state for spec in specs}) == len(specs)
    assert combine({specs[0]: 1}, {"x": 1}).state == combine({specs[0]: 1}, {}).state
    assert combine({}, {"x": 1}).objects != combine({}, {"x": 2}).objects


def test_checkpoints_of_one_state_have_one_digest_in_any_layout(tmp_path: Path) -> None:
    arrays = {
        "model.w": RNG.standard_normal((9, 14)).astype(np.float32),
        "model.b": RNG.integers(0, 2**16, 30, dtype=np.uint16),
        "model.none": np.zeros((0, 3), np.float32),
        "model.scalar": np.array(2.5),
        "rng.rank0.x": RNG.integers(0, 256, 99, dtype=np.uint8),
    }
    dtypes = {"model.b": "BF16"}
    done: list[int] = []
    with saved_reader(tmp_path / "a", arrays, dtypes=dtypes) as reader:
        first = digest_step(reader, on_bytes=done.append)
    assert done == sorted(done)
    assert done[-1] == sum(a.nbytes for a in arrays.values())
    bounds = {"model.w": [(2, 3, 8), (5, 6)], "model.b": [(1, 29)]}
    arrays["rng.rank0.x"] = arrays["rng.rank0.x"][::-1]
    with saved_reader(
        tmp_path / "b", arrays, dtypes=dtypes, bounds=bounds, world_size=12
    ) as reader:
        second = digest_step(reader)
    assert first.state == second.state
    assert first.objects == second.objects
    assert first.rng != second.rng
    assert {n for n in arrays if first.tensors[n] != second.tensors[n]} == {"rng.rank0.x"}
    assert first.tensors["model.none"] == "0" * 32
    assert all(len(value) == 32 for value in first.tensors.values())
