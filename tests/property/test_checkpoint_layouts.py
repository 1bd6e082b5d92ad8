"""Layouts of all kinds: shards tile, writers share, packs give back any box bit for bit."""

import itertools
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard

from everstep.checkpoint.layout import Box, Fragment, TensorSpec
from everstep.checkpoint.manifest import (
    Manifest,
    Part,
    build_manifest,
    decode_manifest,
    encode_manifest,
)
from everstep.checkpoint.pack import StridedBytes, plan_pack, write_pack
from everstep.checkpoint.pack_reader import PackReader
from everstep.checkpoint.reshard import plan_load, plan_save
from everstep.checkpoint.step_reader import StepReader
from tests.support.fragments import grid_of
from tests.support.packs import read_box
from tests.support.shards import MeshLayout, by_chunks, mesh_layouts


@given(mesh_layouts())
@settings(max_examples=300, deadline=None)
def test_boxes_are_those_of_torch_chunk(layout: MeshLayout) -> None:
    for coordinate, box in zip(layout.coordinates(), layout.boxes(), strict=True):
        for indices, offset, n in zip(
            by_chunks(layout, coordinate), box.offset, box.shape, strict=True
        ):
            assert len(indices) == n
            assert not n or (indices[0], indices[-1]) == (offset, offset + n - 1)


@given(mesh_layouts())
@settings(max_examples=300, deadline=None)
def test_boxes_tile_the_tensor(layout: MeshLayout) -> None:
    spec = TensorSpec("t", "U8", layout.shape)
    distinct = {box for box in layout.boxes() if box.size}
    assert sum(box.size for box in distinct) == math.prod(layout.shape)
    for a, b in itertools.combinations(distinct, 2):
        assert a.intersect(b) is None
    boxes = distinct or {spec.whole}  # an empty tensor is held by empty boxes
    assert set(grid_of(spec, boxes).cells()) == distinct


@st.composite
def jobs(draw: st.DrawFn) -> list[list[Fragment]]:
    """For every rank of a mesh, the fragments of several tensors on it."""
    mesh = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    held: list[list[Fragment]] = [[] for _ in range(math.prod(mesh))]
    for number in range(draw(st.integers(0, 6))):
        shape = tuple(draw(st.lists(st.integers(0, 14), min_size=1, max_size=2)))
        placements = tuple(draw(st.sampled_from([Replicate(), Shard(0)])) for _ in mesh)
        spec = TensorSpec(f"t{number}", draw(st.sampled_from(["U8", "F32", "F64"])), shape)
        for fragments, box in zip(held, MeshLayout(shape, mesh, placements).boxes(), strict=True):
            if box.size:
                fragments.append(Fragment(spec, box))
    return held


@given(jobs())
@settings(max_examples=200, deadline=None)
def test_every_fragment_is_written_once_by_one_that_holds_it(held: list[list[Fragment]]) -> None:
    owned = plan_save(held)
    assert all(set(mine) <= set(have) for mine, have in zip(owned, held, strict=True))
    written = Counter(f for mine in owned for f in mine)
    assert written == Counter({f for have in held for f in have})
    assert plan_save([have[::-1] for have in held]) == owned


@given(jobs())
@settings(max_examples=200, deadline=None)
def test_the_last_replica_that_a_writer_got_went_to_the_least_loaded(
    held: list[list[Fragment]],
) -> None:
    owned = plan_save(held)
    load = [sum(f.size_bytes for f in mine) for mine in owned]
    for rank, mine in enumerate(owned):
        shared = [f for f in mine if sum(f in have for have in held) > 1]
        if shared:
            last = max(shared, key=lambda f: (-f.size_bytes, f))
            others = [r for r, have in enumerate(held) if last in have]
            assert load[rank] - last.size_bytes <= min(load[r] for r in others)


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))


def _bytes_of(array: npt.NDArray[Any]) -> StridedBytes:
    flat = array.reshape(-1).view(np.uint8)
    return StridedBytes(flat, 0, array.strides)


def _save(folder: Path, layout: MeshLayout, whole: npt.NDArray[Any], spec: TensorSpec) -> Manifest:
    """Write the packs of all ranks; the manifest goes through its bytes."""
    empty = not spec.size_bytes
    boxes = [spec.whole if empty else box for box in layout.boxes()]
    held = [[Fragment(spec, box)] if box.size or empty else [] for box in boxes]
    parts = []
    for rank, mine in enumerate(plan_save(held)):
        arrays = {f: np.ascontiguousarray(whole[_slices(f.box)]) for f in mine}
        plan = plan_pack(rank, mine)
        record = write_pack(folder / f"p{rank}", plan, lambda f, a=arrays: _bytes_of(a[f]))
        context = {"mesh": {}, "producer": {}, "objects": {}} if rank == 0 else {}
        parts.append(
            Part(
                generation=1,
                step=0,
                rank=rank,
                world_size=len(held),
                pack=record,
                fragments=plan.fragments,
                context=context,
            )
        )
    return decode_manifest(encode_manifest(build_manifest(parts)), "m")


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_any_box_comes_back_bit_for_bit(data: st.DataObject) -> None:
    layout = data.draw(mesh_layouts(max_ranks=8).filter(lambda x: math.prod(x.shape) < 20_000))
    dtype = data.draw(st.sampled_from([("F64", "f8"), ("F32", "f4"), ("BF16", "u2"), ("U8", "u1")]))
    spec = TensorSpec("t", dtype[0], layout.shape)
    random = np.random.default_rng(0).integers(0, 256, spec.size_bytes, dtype=np.uint8)
    whole = random.view(dtype[1]).reshape(layout.shape)
    with tempfile.TemporaryDirectory() as folder:
        manifest = _save(Path(folder), layout, whole, spec)
        for box in _random_boxes(data, spec.shape):
            target = np.zeros(box.shape, dtype=dtype[1])
            _fill(Path(folder), manifest, box, target)
            assert target.tobytes() == whole[_slices(box)].tobytes()
            spread = np.zeros([2 * n for n in box.shape], dtype=dtype[1])
            sparse = StridedBytes(
                spread.reshape(-1).view(np.uint8), 0, tuple(2 * s for s in spread.strides)
            )
            with StepReader(Path(folder), manifest) as reader:
                reader.fill("t", box, sparse)
            assert spread[tuple([np.s_[::2]] * len(box.shape))].tobytes() == target.tobytes()


def _random_boxes(data: st.DataObject, shape: tuple[int, ...]) -> list[Box]:
    boxes = [TensorSpec("t", "U8", shape).whole]
    for _ in range(3):
        spans = []
        for n in shape:
            begin = data.draw(st.integers(0, n))
            spans.append((begin, data.draw(st.integers(begin, n))))
        boxes.append(Box(tuple(b for b, _ in spans), tuple(e - b for b, e in spans)))
    return boxes


def _fill(folder: Path, manifest: Manifest, box: Box, target: npt.NDArray[Any]) -> None:
    stored = manifest.tensors["t"]
    count = np.zeros(box.shape, dtype=int)
    starts, item_bytes = manifest.starts("t"), stored.spec.item_bytes
    for copy in plan_load(stored.layout, stored.packs, starts, item_bytes, box):
        inside = Box(copy.box.relative_to(box), copy.box.shape)
        count[_slices(inside)] += 1
        offset = sum(i * s for i, s in zip(inside.offset, target.strides, strict=True))
        with PackReader(folder / f"p{copy.pack}", manifest.packs[copy.pack]) as reader:
            cell = Fragment(stored.spec, copy.cell)
            read_box(reader, cell, copy.start, copy.box, _bytes_of(target), offset)
    assert (count == 1).all()
