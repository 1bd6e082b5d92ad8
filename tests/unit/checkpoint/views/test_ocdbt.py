"""TensorStore reads the index: trees of any height, long values, and never what is not there."""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts

from everstep.checkpoint.layout import Grid, TensorSpec
from everstep.checkpoint.manifest import Manifest, StoredTensor
from everstep.checkpoint.pack import PackRecord
from everstep.checkpoint.views.ocdbt import ocdbt_files
from everstep.checkpoint.views.ocdbt_format import MOST_INLINE_BYTES
from tests.support.view_programs import function
from tests.support.written_steps import Cut, packed, random_bits, torch_chunks, uneven_cuts

open_tensor = function("TensorStore", "open_tensor")


def _write(folder: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return f"{folder.as_uri()}/"


def _store(url: str) -> ts.KvStore:
    return ts.KvStore.open({"driver": "ocdbt", "base": url}).result()


@pytest.mark.parametrize("node_entries", [2, 3, 7, 4096])
def test_trees_of_any_height(tmp_path: Path, node_entries: int) -> None:
    cuts = uneven_cuts()
    manifest, packs = packed(cuts)
    files = ocdbt_files(manifest, node_entries)
    url = _write(tmp_path, {**packs, **files})
    keys = _store(url).list().result()
    assert len(keys) == len(set(keys))
    assert {b"rows/c/3/0", b"rows/zarr.json", b"scalar/c", b"zarr.json"} < set(keys)
    assert b"optimizer.a%2Fb%25.__x/c/0" in keys
    for name in (
        "rows",
        "columns",
        "cube",
        "scalar",
        "empty",
        "types.F8_E4M3",
        "flat",
        "flat rows",
        "boxes",
    ):
        found = open_tensor(url, name).read().result()
        assert found.tobytes() == cuts[name].bits.tobytes()


def test_the_same_manifest_gives_the_same_bytes() -> None:
    manifest, _ = packed(uneven_cuts())
    assert ocdbt_files(manifest) == ocdbt_files(manifest)
    other, _ = packed(uneven_cuts(), seed=1)
    assert ocdbt_files(manifest) != ocdbt_files(other)


def test_numbers_are_bits_of_the_type(tmp_path: Path) -> None:
    ones = np.full((3,), 0x3F80, "<u2")
    manifest, packs = packed({"w": Cut("BF16", ones)})
    url = _write(tmp_path, {**packs, **ocdbt_files(manifest)})
    tensor = ts.open(f"{url}|ocdbt:w/|zarr3:", read=True).result()
    assert tensor.dtype == ts.bfloat16
    assert tensor.read().result().astype("f4").tolist() == [1.0, 1.0, 1.0]


def test_a_checkpoint_without_tensors_is_an_empty_group(tmp_path: Path) -> None:
    manifest, packs = packed({})
    store = _store(_write(tmp_path, {**packs, **ocdbt_files(manifest)}))
    assert store.list().result() == [b"zarr.json"]
    about = json.loads(store["zarr.json"])
    assert about["attributes"] == {"everstep_step": 1, "everstep_generation": 1}


def test_long_metadata_lies_beside_the_tree(tmp_path: Path) -> None:
    inner = [at for at in range(1, 2000) if at % 5][:500]
    cut = Cut("F32", random_bits((20000, 2), "F32"), (inner, [1]))
    manifest, packs = packed({"w": cut})
    url = _write(tmp_path, {**packs, **ocdbt_files(manifest)})
    assert len(_store(url)["w/1x1/zarr.json"]) > MOST_INLINE_BYTES
    assert open_tensor(url, "w").read().result().tobytes() == cut.bits.tobytes()


def test_a_tensor_of_several_arrays_cannot_be_taken_for_one(tmp_path: Path) -> None:
    cut = Cut("I32", random_bits((1001, 3), "I32"), (torch_chunks(1001, 2, 4), ()))
    manifest, packs = packed({"w": cut})
    url = _write(tmp_path, {**packs, **ocdbt_files(manifest)})
    with pytest.raises(ValueError, match="node_type"):
        ts.open(f"{url}|ocdbt:w/|zarr3:", read=True).result()


def test_truth_values_are_not_followed_by_other_bytes(tmp_path: Path) -> None:
    """TensorStore refuses a chunk with a byte that is neither, even outside of the tensor."""
    cut = Cut("BOOL", random_bits((5, 3), "BOOL"), ([2], []))
    other = Cut("U8", np.full((9,), 255, np.uint8))
    manifest, packs = packed({"a": cut, "b": other})
    url = _write(tmp_path, {**packs, **ocdbt_files(manifest)})
    assert open_tensor(url, "a").read().result().tobytes() == cut.bits.tobytes()


@pytest.mark.parametrize("dtype", ["I32", "BF16", "BOOL"])
@pytest.mark.parametrize("left_bytes", [None, 0, 4096, 4100])
def test_a_lost_or_short_pack_is_an_error(
    tmp_path: Path, dtype: str, left_bytes: int | None
) -> None:
    manifest, packs = packed({"w": Cut(dtype, random_bits((64,), dtype))})
    files = {name: data[:left_bytes] for name, data in packs.items() if left_bytes is not None}
    url = _write(tmp_path, {**files, **ocdbt_files(manifest)})
    tensor = open_tensor(url, "w")
    with pytest.raises(ValueError, match=r"Not enough data|is not valid for value of size"):
        tensor.read().result()


def test_thousands_of_tensors_on_many_ranks(tmp_path: Path) -> None:
    manifest = _large_manifest(n_tensors=2000, n_packs=64)
    files = ocdbt_files(manifest)
    assert sum(map(len, files.values())) < 3_500_000
    store = _store(_write(tmp_path, dict(files)))
    assert len(store.list().result()) == 2000 * 65 + 1
    last = manifest.packs[63]
    (tmp_path / last.file).write_bytes(bytes(last.size_bytes - 12) + b"the last table")
    assert store["t1999/c/63"] == b"the last"


def _large_manifest(n_tensors: int, n_packs: int) -> Manifest:
    """As many tensors as a large model has, each a word on every rank."""
    grid = Grid((tuple(range(n_packs + 1)),))
    tensors = {
        name: StoredTensor(TensorSpec(name, "F64", (n_packs,)), grid, tuple(range(n_packs)))
        for name in (f"t{number:04d}" for number in range(n_tensors))
    }
    packs = tuple(
        PackRecord(
            file=f"rank-{rank:05d}-ab.safetensors",
            rank=rank,
            size_bytes=4096 + 8 * n_tensors + 4,
            data_start=4096,
            data_bytes=8 * n_tensors,
            crc32c=0,
        )
        for rank in range(n_packs)
    )
    return Manifest(
        generation=1, step=1, mesh={}, producer={}, objects={}, packs=packs, tensors=tensors
    )
