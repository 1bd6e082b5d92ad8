"""However tensors are cut, TensorStore and zarr-python read what was saved, bit for bit."""

import json
import tempfile
from pathlib import Path

import fsspec
import numpy as np
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.checkpoint.layout import ITEM_BYTES
from everstep.checkpoint.views.chunking import candidates
from everstep.checkpoint.views.ocdbt import ocdbt_files
from everstep.checkpoint.views.placement import place_cells
from everstep.checkpoint.views.zarr_metadata import node_name
from everstep.checkpoint.views.zarr_references import reference_text
from tests.support.view_programs import function
from tests.support.written_steps import Cut, packed, random_bits, torch_chunks

open_tensor = function("TensorStore", "open_tensor")
read_tensor = function("zarr-python", "read_tensor")


@st.composite
def cuts_of_one(draw: st.DrawFn) -> Cut:
    """A tensor of few dims that is cut anywhere, or as ``torch.chunk`` does."""
    dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
    shape = draw(st.lists(st.integers(0, 12), max_size=4))
    inner = []
    for n in shape:
        if draw(st.booleans()):
            inner.append(torch_chunks(n, *draw(st.lists(st.integers(1, 4), max_size=2))))
        else:
            inner.append(sorted(draw(st.sets(st.integers(1, max(1, n - 1)), max_size=3))))
    inner = [[at for at in edges if at < n] for edges, n in zip(inner, shape, strict=True)]
    return Cut(dtype, random_bits(shape, dtype, draw(st.integers(0, 99))), inner)


names = st.text(st.sampled_from("abc01./_%-äz "), min_size=1, max_size=8)
states = st.dictionaries(names, cuts_of_one(), min_size=1, max_size=5)


@given(states, st.integers(0, 99), st.integers(2, 40))
@settings(max_examples=60, deadline=None)
def test_tensorstore_reads_what_was_saved(
    cuts: dict[str, Cut], seed: int, node_entries: int
) -> None:
    manifest, packs = packed(cuts, seed)
    with tempfile.TemporaryDirectory() as folder:
        for name, data in (packs | dict(ocdbt_files(manifest, node_entries))).items():
            (Path(folder) / name).write_bytes(data)
        for name, cut in cuts.items():
            tensor = open_tensor(f"file://{folder}/", node_name(name))
            assert tensor.shape == cut.bits.shape
            assert tensor.read().result().tobytes() == cut.bits.tobytes(), name


@given(states, st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_zarr_reads_what_was_saved(cuts: dict[str, Cut], seed: int) -> None:
    manifest, packs = packed(cuts, seed)
    store = fsspec.filesystem("memory")
    for name, data in packs.items():
        store.pipe_file(f"/packs/{name}", data)
    references = json.loads("".join(reference_text(manifest, "/packs")))
    group = zarr.open_group(
        "reference://", mode="r", storage_options={"fo": references, "remote_protocol": "memory"}
    )
    assert sorted(group) == sorted(map(node_name, cuts))
    for name, cut in cuts.items():
        found = read_tensor(group, node_name(name))
        assert found.shape == cut.bits.shape
        assert found.tobytes() == cut.bits.tobytes(), name
    store.rm("/packs", recursive=True)


@given(states, st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_cells_are_placed_as_the_packs_have_them(cuts: dict[str, Cut], seed: int) -> None:
    manifest, _ = packed(cuts, seed)
    for name, places in place_cells(manifest).items():
        tensor = manifest.tensors[name]
        assert places.packs.tolist() == list(tensor.packs)
        for pack, offset, cell in zip(
            tensor.packs, places.offsets.tolist(), tensor.grid.cells(), strict=True
        ):
            start, _ = manifest.pack_indexes[pack].starts[name, cell.offset]
            assert offset == manifest.packs[pack].data_start + start


@given(cuts_of_one())
@settings(max_examples=300, deadline=None)
def test_a_chunk_is_one_run_of_bytes_of_one_cell(cut: Cut) -> None:
    grid, shape = cut.grid, cut.bits.shape
    items = np.arange(cut.bits.size).reshape(shape)
    cells = list(grid.cells())
    found = candidates(grid)
    assert [len(c.cells) for c in found] == sorted(len(c.cells) for c in found)
    for chunking in found:
        if not cut.bits.size:
            assert not len(chunking.cells)
            continue
        for number, index in enumerate(np.ndindex(chunking.counts)):
            box = cells[chunking.cells[number]]
            stored = items[
                tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
            ]
            spans = [
                slice(i * n, (i + 1) * n) for i, n in zip(index, chunking.chunk_shape, strict=True)
            ]
            wanted = items[tuple(spans)]
            first = chunking.item_offsets[number]
            full = np.full(chunking.chunk_shape, -1)
            run = stored.reshape(-1)[first : first + full.size]
            full.reshape(-1)[: run.size] = run
            assert (full[tuple(slice(n) for n in wanted.shape)] == wanted).all()
