"""Safetensors files: read as the library writes them, refused when damaged, written for it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch

from everstep.checkpoint.convert.atomic import ByteCount
from everstep.checkpoint.convert.errors import SafetensorsError
from everstep.checkpoint.convert.safetensors_source import (
    INDEX_NAME,
    SafetensorsFile,
    SafetensorsSource,
)
from everstep.checkpoint.convert.safetensors_writer import plan_shards, write_file, write_shards
from everstep.checkpoint.convert.source import read_box
from everstep.checkpoint.errors import CheckpointError
from everstep.checkpoint.layout import Box, TensorSpec
from tests.support.conversions import Arrays, ArraySource

MIB = 2**20


def some_arrays() -> Arrays:
    random = np.random.default_rng(0)
    return {
        "a.weight": random.normal(size=(700, 900)).astype("<f4"),
        "b": random.integers(0, 2**16, (5, 3), dtype="<u2"),
        "c": np.array(3.5),
        "empty": np.empty((0, 4), "<f4"),
        "n": np.arange(7),
    }


def test_any_box_of_what_the_library_wrote(tmp_path: Path) -> None:
    arrays = {n: a for n, a in some_arrays().items() if a.dtype != np.dtype("<u2")}
    save_file(arrays, tmp_path / "x.safetensors")
    with SafetensorsSource(tmp_path / "x.safetensors") as source:
        assert source.tensors.keys() == arrays.keys()
        for name, array in arrays.items():
            found = read_box(source, name, source.tensors[name].whole)
            assert found.tobytes() == array.tobytes()
        box = Box((3, 5), (600, 7))
        assert (
            read_box(source, "a.weight", box).tobytes() == arrays["a.weight"][3:603, 5:12].tobytes()
        )


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    arrays = some_arrays()
    source, told = ArraySource(arrays), list[int]()
    written = ByteCount(told.append)
    write_file(tmp_path / "x", source, source.tensors.values(), budget_bytes=MIB, written=written)
    found = load_torch(tmp_path / "x")
    assert found["b"].dtype == torch.bfloat16
    for name, array in arrays.items():
        assert found[name].reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes()
        assert found[name].shape == array.shape
    assert told == sorted(told)
    assert told[-1] == written.total == sum(a.nbytes for a in arrays.values())
    assert len(told) > 15  # in blocks of an eighth of the budget


def test_dtypes_that_the_library_lacks_are_written_as_others(tmp_path: Path) -> None:
    array = np.array([1 + 2j, -3.5j, 4])
    source = ArraySource({"z": array, "a": np.arange(3)})
    written = ByteCount(None)
    write_file(tmp_path / "x", source, source.tensors.values(), budget_bytes=MIB, written=written)
    found = load_file(tmp_path / "x")
    assert found["z"].dtype == np.float64
    np.testing.assert_array_equal(found["z"].reshape(-1).view(np.complex128), array)


def test_shards_and_their_index(tmp_path: Path) -> None:
    arrays = {f"t{i}": np.full((100,), i, "<f4") for i in range(5)}
    source = ArraySource(arrays)
    shards = plan_shards(source.tensors.values(), 900)
    assert [len(shard) for shard in shards] == [2, 2, 1]
    assert plan_shards([TensorSpec("big", "F32", (9999,))], 10) == [
        [TensorSpec("big", "F32", (9999,))]
    ]
    write_shards(tmp_path, source, shards, budget_bytes=MIB, written=ByteCount(None))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        INDEX_NAME,
    ]
    assert load_file(tmp_path / "model-00002-of-00003.safetensors").keys() == {"t2", "t3"}
    with SafetensorsSource(tmp_path) as again:
        assert again.tensors == source.tensors
        for name, array in arrays.items():
            assert read_box(again, name, Box((7,), (20,))).tobytes() == array[7:27].tobytes()
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == 2000


def test_names_with_their_file(tmp_path: Path) -> None:
    for rank in range(2):
        save_file({"w": np.full((2,), rank)}, tmp_path / f"rank_{rank}.safetensors")
    with SafetensorsSource(tmp_path, with_file=True) as source:
        assert sorted(source.tensors) == ["rank_0/w", "rank_1/w"]
    with pytest.raises(SafetensorsError, match="'w' is in another file of it, too"):
        SafetensorsSource(tmp_path)


def header(entries: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


GOOD = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        header({"a": GOOD}),
        header({"a": GOOD}, b"12345"),
        header({"a": GOOD}, b"1234", length=2**63),
        header(b"{", b"1234"),
        header(b"[" * 5000),
        header([1]),
        header({"a": 3}, b"1234"),
        header({"a": GOOD | {"dtype": "X9"}}, b"1234"),
        header({"a": GOOD | {"shape": [2]}}, b"1234"),
        header({"a": GOOD | {"shape": [-1]}}, b"1234"),
        header({"a": GOOD | {"shape": [2**60, 2**60]}}, b"1234"),
        header({"a": GOOD | {"data_offsets": [-4, 0]}}, b"1234"),
        header({"a": GOOD | {"data_offsets": [1, 5]}}, b"12345"),
        header({"a": GOOD, "b": GOOD}, b"1234"),
        header({"a": GOOD | {"shape": [True]}}, b"1234"),
        header({"__metadata__": 3, "a": GOOD}, b"1234"),
    ],
)
def test_files_that_are_not_valid(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(SafetensorsError, match=r"x\.safetensors is damaged: "):
        SafetensorsFile(path)


def test_cut_short_at_every_length(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": np.arange(3), "b": np.arange(5)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(SafetensorsError):
            SafetensorsFile(path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "it is no index"),
        ("[]", "it is no index"),
        ('{"weight_map": {}}', "it is no index"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "no name of a file beside it"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "no name of a file beside it"),
        ('{"weight_map": {"a": ".."}}', "no name of a file beside it"),
        ('{"weight_map": {"a": 3}}', "no name of a file beside it"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "the file is missing"),
        ('{"weight_map": {"b": "x.safetensors"}}', "disagree about 2 tensors, such as 'a'"),
    ],
)
def test_an_index_that_does_not_fit(tmp_path: Path, index: str, message: str) -> None:
    save_file({"a": np.arange(3)}, tmp_path / "x.safetensors")
    (tmp_path / INDEX_NAME).write_text(index)
    with pytest.raises(SafetensorsError) as caught:
        SafetensorsSource(tmp_path)
    assert message in str(caught.value)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no safetensors"):
        SafetensorsSource(tmp_path)
    with pytest.raises(CheckpointError, match="there is no "):
        SafetensorsSource(tmp_path / "none")
