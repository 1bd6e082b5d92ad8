"""However tensors are cut, TensorStore and zarr-python read what was saved, bit for bit."""

import json
import math
import tempfile
from pathlib import Path

import fsspec
import numpy as np
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.checkpoint.layout import ITEM_BYTES, Box
from everstep.checkpoint.views.chunking import candidates
from everstep.checkpoint.views.ocdbt import ocdbt_files
from everstep.checkpoint.views.zarr_metadata import node_name
from everstep.checkpoint.views.zarr_references import reference_text
from tests.support.view_programs import function
from tests.support.written_steps import Cut, packed, random_bits, torch_chunks

open_tensor = function("TensorStore", "open_tensor")
read_tensor = function("zarr-python", "read_tensor")


bits_of = st.builds(
    lambda dtype, shape, seed: (dtype, random_bits(shape, dtype, seed)),
    st.sampled_from(sorted(ITEM_BYTES)),
    st.lists(st.integers(0, 12), max_size=4),
    st.integers(0, 99),
)


@st.composite
def grids(draw: st.DrawFn) -> Cut:
    """A tensor of few dims that is cut anywhere, or as ``torch.chunk`` does."""
    dtype, bits = draw(bits_of)
    inner = []
    for n in bits.shape:
        if draw(st.booleans()):
            edges = torch_chunks(n, *draw(st.lists(st.integers(1, 4), max_size=2)))
        else:
            edges = sorted(draw(st.sets(st.integers(1, max(1, n - 1)), max_size=3)))
        inner.append([at for at in edges if at < n])
    return Cut(dtype, bits, inner)


@st.composite
def flat_ranges(draw: st.DrawFn) -> Cut:
    """A tensor of which ranks hold ranges, in any place or whole rows."""
    dtype, bits = draw(bits_of)
    row = math.prod(bits.shape[1:]) if draw(st.booleans()) else 1
    edges = {at * row for at in draw(st.sets(st.integers(1, 40), max_size=4))}
    return Cut(dtype, bits, flat=sorted(at for at in edges if 0 < at < bits.size))


@st.composite
def box_lists(draw: st.DrawFn) -> Cut:
    """A tensor that is cut in two, and each part again."""
    dtype, bits = draw(bits_of)
    boxes = [Box((0,) * bits.ndim, bits.shape)]
    for _ in range(draw(st.integers(0, 4)) if bits.ndim else 0):
        offset, shape = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, bits.ndim - 1))
        at = draw(st.integers(0, shape[dim]))
        for begin, end in ((0, at), (at, shape[dim])):
            if begin < end:
                where, size = [*offset], [*shape]
                where[dim], size[dim] = where[dim] + begin, end - begin
                boxes.append(Box(tuple(where), tuple(size)))
        if not boxes:
            break
    return Cut(dtype, bits, boxes=boxes)


names = st.text(st.sampled_from("abc01./_%-äz "), min_size=1, max_size=8)
states = st.dictionaries(names, grids() | flat_ranges() | box_lists(), min_size=1, max_size=5)


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


@given(grids())
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
