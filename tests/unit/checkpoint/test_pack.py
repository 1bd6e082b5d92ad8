"""Packs: valid safetensors files whose every byte is vouched for."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from everstep.checkpoint import pack as pack_module
from everstep.checkpoint.errors import BlockChecksumError, LayoutError, PackHeaderError
from everstep.checkpoint.kernels import crc32c
from everstep.checkpoint.layout import Box, Fragment, TensorSpec
from everstep.checkpoint.pack import (
    BLOCK_BYTES,
    STORED_AS,
    TABLE_NAME,
    PackRecord,
    StridedBytes,
    plan_pack,
    write_pack,
)
from everstep.checkpoint.pack_reader import PackReader
from everstep.checkpoint.torch_layout import DTYPES, strided_bytes
from tests.support.fragments import flat_fragment
from tests.support.packs import read_box

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")

Tensors = dict[Fragment, torch.Tensor]


def _random(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    count = int(np.prod(shape)) * dtype.itemsize
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    return data.view(dtype).reshape(shape)


def _tensors() -> Tensors:
    """One fragment of every dtype, a scalar, an empty one, a part, one of more than a block."""
    torch.manual_seed(0)
    found = {}
    for number, (name, dtype) in enumerate(DTYPES.items()):
        spec = TensorSpec(f"t{number}", name, (3, 2 + number))
        found[Fragment(spec, spec.whole)] = _random(dtype, spec.shape)
    for name, shape in (("scalar", ()), ("empty", (4, 0)), ("large", (700, 600))):
        spec = TensorSpec(name, "F32", shape)
        found[Fragment(spec, spec.whole)] = _random(torch.float32, shape)
    part = Fragment(TensorSpec("part", "F16", (9, 9)), Box((3, 2), (2, 5)))
    found[part] = _random(torch.float16, part.box.shape)
    range_ = flat_fragment(TensorSpec("range", "C32", (9, 9)), 5, 50)
    found[range_] = _random(torch.complex32, range_.box.shape)
    return found


def _as_stored(fragment: Fragment, tensor: torch.Tensor) -> torch.Tensor:
    """What a reader of safetensors sees: another dtype where that has none for it."""
    name, more_dims = STORED_AS.get(fragment.spec.dtype, (fragment.spec.dtype, ()))
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    return data.view(DTYPES[name]).reshape((*fragment.box.shape, *more_dims))


def _write(path: Path, tensors: Tensors, threads: int = 1) -> PackRecord:
    return write_pack(
        path, plan_pack(2, tensors), lambda f: strided_bytes(tensors[f]), threads=threads
    )


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.shape, _bytes(a)) == (b.dtype, b.shape, _bytes(b))


@pytest.mark.parametrize("threads", [1, 3])
def test_safetensors_opens_it(tmp_path: Path, threads: int) -> None:
    tensors = _tensors()
    record = _write(tmp_path / "p.safetensors", tensors, threads)
    loaded = load_file(tmp_path / "p.safetensors")
    assert loaded.keys() == {f.key for f in tensors} | {TABLE_NAME}
    for fragment, tensor in tensors.items():
        assert _equal(loaded[fragment.key], _as_stored(fragment, tensor)), fragment.key
    with safe_open(tmp_path / "p.safetensors", "pt") as file:
        about = file.metadata()
    assert (about["everstep_pack"], about["rank"]) == ("1", "2")
    fragments = json.loads(about["fragments"])
    assert fragments["part[3:5,2:7]"] == ["part", [9, 9], [3, 2]]
    assert fragments["range[flat 5:50]"] == ["range", [9, 9], {"flat": 5}, "C32"]
    assert record.size_bytes == (tmp_path / "p.safetensors").stat().st_size


def test_everything_is_aligned_and_without_holes(tmp_path: Path) -> None:
    tensors = _tensors()
    record = _write(tmp_path / "p", tensors)
    data = (tmp_path / "p").read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])
    assert record.data_start == 8 + header_bytes
    assert record.data_start % 4096 == 0
    position = 0
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            assert begin == position
            position = end
    assert record.data_start + position == len(data)
    for fragment in tensors:
        assert header[fragment.key]["data_offsets"][0] % fragment.spec.item_bytes == 0


def test_checksums_are_those_of_the_blocks(tmp_path: Path) -> None:
    record = _write(tmp_path / "p", _tensors())
    data = (tmp_path / "p").read_bytes()
    body = data[record.data_start : record.data_start + record.data_bytes]
    blocks = [body[i : i + BLOCK_BYTES] for i in range(0, len(body), BLOCK_BYTES)]
    assert len(blocks) == 2
    table = np.frombuffer(data[record.data_start + record.data_bytes :], dtype="<u4")
    assert table.tolist() == [crc32c(block) for block in blocks]
    assert record.crc32c == crc32c(data[: record.data_start] + table.tobytes())


def test_the_header_depends_on_the_layout_only() -> None:
    tensors = _tensors()
    shuffled = dict(reversed(tensors.items()))
    assert plan_pack(2, tensors) == plan_pack(2, shuffled)
    assert plan_pack(1, tensors).header != plan_pack(2, tensors).header


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.t(),
        lambda t: t[::2, 1::3],
        lambda t: t.unflatten(1, (3, 4)).permute(2, 0, 1),
        lambda t: t[3],
        lambda t: t[2:2],
        lambda t: t[1:2].expand(5, 12),
    ],
    ids=["transposed", "sliced", "permuted", "row", "none", "expanded"],
)
def test_sources_of_any_strides(
    tmp_path: Path, view: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    tensor = view(torch.arange(120, dtype=torch.int32).reshape(10, 12))
    spec = TensorSpec("t", "I32", tuple(tensor.shape))
    _write(tmp_path / "p", {Fragment(spec, spec.whole): tensor})
    assert torch.equal(load_file(tmp_path / "p")["t"], tensor)


def test_names_that_would_collide() -> None:
    spec = TensorSpec("w", "F32", (2,))
    odd = TensorSpec("w[0:1]", "F32", (1,))
    with pytest.raises(LayoutError, match="rank 4 have the same name"):
        plan_pack(4, [Fragment(spec, Box((0,), (1,))), Fragment(odd, odd.whole)])


def test_sources_are_asked_for_one_at_a_time(tmp_path: Path) -> None:
    tensors, asked = _tensors(), []

    def source_of(fragment: Fragment) -> StridedBytes:
        asked.append(fragment)
        return strided_bytes(tensors[fragment])

    plan = plan_pack(0, tensors)
    write_pack(tmp_path / "p", plan, source_of)
    assert asked == [f for f in plan.fragments if f.size_bytes]


def test_progress_counts_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    tensors = _tensors()
    record = write_pack(
        tmp_path / "p", plan_pack(0, tensors), lambda f: strided_bytes(tensors[f]),
        on_bytes=seen.append,
    )  # fmt: skip
    assert seen == sorted(seen)
    assert seen[-1] == record.data_bytes


def test_nothing_to_hold(tmp_path: Path) -> None:
    record = _write(tmp_path / "p", {})
    assert load_file(tmp_path / "p").keys() == {TABLE_NAME}
    with PackReader(tmp_path / "p", record) as reader:
        reader.verify_all()


def _read(reader: PackReader, tensors: Tensors, fragment: Fragment, box: Box) -> torch.Tensor:
    plan = plan_pack(2, tensors)
    target = torch.zeros(box.shape, dtype=DTYPES[fragment.spec.dtype])
    start = plan.starts[plan.fragments.index(fragment)]
    read_box(reader, fragment, start, box, strided_bytes(target))
    return target


def test_any_box_of_any_fragment(tmp_path: Path) -> None:
    tensors = _tensors()
    record = _write(tmp_path / "p", tensors)
    with PackReader(tmp_path / "p", record) as reader:
        for fragment, tensor in tensors.items():
            if not fragment.size_bytes:
                continue
            assert _equal(_read(reader, tensors, fragment, fragment.box), tensor)
            if len(fragment.box.shape) == 2:
                (top, left), (rows, columns) = fragment.box.offset, fragment.box.shape
                box = Box((top + 1, left + 1), (rows - 1, columns - 1))
                assert _equal(_read(reader, tensors, fragment, box), tensor[1:, 1:])


def test_only_touched_blocks_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_module, "BLOCK_BYTES", 4096)
    spec = TensorSpec("t", "U8", (10 * 4096,))
    fragment, tensor = Fragment(spec, spec.whole), _random(torch.uint8, spec.shape)
    tensors = {fragment: tensor}
    record = _write(tmp_path / "p", tensors)
    damaged = bytearray((tmp_path / "p").read_bytes())
    damaged[record.data_start + 5 * 4096 + 7] ^= 0x80
    (tmp_path / "p").write_bytes(damaged)
    with PackReader(tmp_path / "p", record) as reader:
        for begin, end in ((0, 5 * 4096), (6 * 4096, 10 * 4096), (4 * 4096 + 1, 5 * 4096)):
            box = Box((begin,), (end - begin,))
            assert torch.equal(_read(reader, tensors, fragment, box), tensor[begin:end])
        for begin, end in ((5 * 4096, 5 * 4096 + 1), (0, 10 * 4096), (5 * 4096 - 1, 6 * 4096)):
            with pytest.raises(BlockChecksumError, match=r"p is damaged: block 5 has") as caught:
                _read(reader, tensors, fragment, Box((begin,), (end - begin,)))
            assert caught.value.block == 5
        with pytest.raises(BlockChecksumError):
            reader.verify_all()


def test_a_damaged_block_is_found_every_time(tmp_path: Path) -> None:
    spec = TensorSpec("t", "U8", (3 * BLOCK_BYTES,))
    fragment, tensor = Fragment(spec, spec.whole), _random(torch.uint8, spec.shape)
    tensors = {fragment: tensor}
    record = _write(tmp_path / "p", tensors)
    with (tmp_path / "p").open("r+b") as file:
        file.seek(record.data_start + BLOCK_BYTES + 9)
        file.write(bytes([int(tensor[BLOCK_BYTES + 9]) ^ 1]))
    with PackReader(tmp_path / "p", record) as reader:
        for _ in range(2):  # of what a failed call has read nothing counts as verified
            with pytest.raises(BlockChecksumError) as caught:
                _read(reader, tensors, fragment, fragment.box)
            assert (caught.value.block, caught.value.path) == (1, str(tmp_path / "p"))
            block = tensor[BLOCK_BYTES : 2 * BLOCK_BYTES].numpy()
            assert caught.value.expected == crc32c(block)
        for begin, end in ((5, BLOCK_BYTES), (2 * BLOCK_BYTES, spec.shape[0])):
            box = Box((begin,), (end - begin,))
            assert torch.equal(_read(reader, tensors, fragment, box), tensor[begin:end])


def test_another_pack_of_the_same_size(tmp_path: Path) -> None:
    spec = TensorSpec("t", "U8", (100,))
    fragment = Fragment(spec, spec.whole)
    records = [
        _write(tmp_path / name, {fragment: _random(torch.uint8, spec.shape)}) for name in "ab"
    ]
    with pytest.raises(PackHeaderError, match=r"b is damaged: .* does not match the manifest"):
        PackReader(tmp_path / "b", records[0])


def test_a_file_that_cannot_be_read_is_an_error_and_no_crash(tmp_path: Path) -> None:
    spec = TensorSpec("t", "U8", (3 * BLOCK_BYTES,))
    fragment = Fragment(spec, spec.whole)
    record = _write(tmp_path / "p", {fragment: torch.zeros(spec.shape, dtype=torch.uint8)})
    with PackReader(tmp_path / "p", record) as reader:
        os.truncate(tmp_path / "p", record.data_start + BLOCK_BYTES)
        with pytest.raises(OSError, match=r"Input/output error: .*/p'"):
            reader.verify_all()
