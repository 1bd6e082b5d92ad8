"""Any layout to any layout, bit for bit: mesh shards, lists of boxes and flat ranges alike."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.checkpoint.coverage import check_boxes
from everstep.checkpoint.errors import LayoutError
from everstep.checkpoint.layout import (
    Box,
    Fragment,
    TensorSpec,
    flat_boxes,
    flat_index,
)
from everstep.checkpoint.manifest import (
    Manifest,
    Part,
    build_manifest,
    decode_manifest,
    decode_part,
    encode_manifest,
    encode_part,
)
from everstep.checkpoint.pack import PackRecord, plan_pack
from everstep.checkpoint.reshard import plan_load, plan_save
from tests.support.fragments import flat_fragment, layout_of
from tests.support.shards import MeshLayout, by_chunks, mesh_layouts

DTYPES = {"F64": "f8", "BF16": "u2", "U8": "u1", "C128": "c16"}
MAX_ITEMS = 20_000
Held = list[list[Fragment]]
"""For each rank the fragments that it holds."""
Bytes = dict[Fragment, bytes]


def _tiles(draw: st.DrawFn, box: Box, left: int) -> list[Box]:
    """Boxes that tile a box: cut anywhere, again and again."""
    dims = [d for d, n in enumerate(box.shape) if n > 1]
    if not left or not dims or draw(st.integers(0, 5)) == 0:
        return [box]
    dim = draw(st.sampled_from(dims))
    at = draw(st.integers(1, box.shape[dim] - 1))
    found = []
    for begin, end in ((0, at), (at, box.shape[dim])):
        offset = (*box.offset[:dim], box.offset[dim] + begin, *box.offset[dim + 1 :])
        shape = (*box.shape[:dim], end - begin, *box.shape[dim + 1 :])
        found += _tiles(draw, Box(offset, shape), left - 1)
    return found


def _ranges(draw: st.DrawFn, spec: TensorSpec) -> list[Fragment]:
    size = math.prod(spec.shape)
    cuts = sorted(draw(st.lists(st.integers(0, size), max_size=6)))
    edges = [0, *cuts, size]
    return [flat_fragment(spec, lo, hi) for lo, hi in itertools.pairwise(edges) if lo < hi]


def _held(draw: st.DrawFn, spec: TensorSpec) -> Held:
    """What ranks hold of a tensor, in one of all forms, with replicas."""
    match draw(st.sampled_from(["mesh", "boxes", "ranges"])):
        case "mesh":
            layout = draw(mesh_layouts(max_ranks=12, shape=spec.shape))
            return [[Fragment(spec, box)] if box.size else [] for box in layout.boxes()]
        case "boxes" if math.prod(spec.shape):
            parts = [Fragment(spec, box) for box in _tiles(draw, spec.whole, 4)]
        case _:
            parts = _ranges(draw, spec)
    held: Held = [[] for _ in range(draw(st.integers(1, 6)))]
    for part in parts:
        for rank in draw(st.sets(st.integers(0, len(held) - 1), min_size=1, max_size=2)):
            held[rank].append(part)
    return held


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))


def _of(whole: npt.NDArray[Any], fragment: Fragment) -> npt.NDArray[Any]:
    return (whole.reshape(-1) if fragment.flat else whole)[_slices(fragment.box)]


def _save(held: Held, contents: Bytes) -> tuple[Manifest, list[bytes]]:
    """The manifest, and the data of each pack; manifest and parts go through their bytes."""
    parts, packs = [], []
    nodes = [rank // 2 for rank in range(len(held))]
    for rank, mine in enumerate(plan_save(held, nodes)):
        plan = plan_pack(rank, mine)
        data = b"".join(contents[f] for f in plan.fragments)
        record = PackRecord(
            file=f"p{rank}",
            rank=rank,
            size_bytes=plan.size_bytes,
            data_start=len(plan.header),
            data_bytes=plan.data_bytes,
            crc32c=0,
        )
        context = {"mesh": {}, "producer": {}, "objects": {}} if rank == 0 else {}
        part = Part(
            generation=1,
            step=0,
            rank=rank,
            world_size=len(held),
            pack=record,
            fragments=plan.fragments,
            context=context,
        )
        parts.append(decode_part(encode_part(part), "p"))
        packs.append(data)
    return decode_manifest(encode_manifest(build_manifest(parts)), "m"), packs


def _read_box(manifest: Manifest, packs: Sequence[bytes], spec: TensorSpec, box: Box) -> Any:
    dtype = np.dtype(DTYPES[spec.dtype])
    target = np.zeros(box.shape, dtype)
    times = np.zeros(box.shape, int)
    if spec.name in manifest.tensors:
        stored = manifest.tensors[spec.name]
        starts = manifest.starts(spec.name)
        for pack, start, cell, part in plan_load(
            stored.layout, stored.packs, starts, spec.item_bytes, box
        ):
            source = np.frombuffer(packs[pack], dtype, cell.size, start).reshape(cell.shape)
            inside = _slices(Box(part.relative_to(box), part.shape))
            target[inside] = source[_slices(Box(part.relative_to(cell), part.shape))]
            times[inside] += 1
    assert (times == 1).all()
    return target


def _read(manifest: Manifest, packs: Sequence[bytes], wanted: Fragment) -> bytes:
    spec, box, flat = wanted
    if not flat:
        return bytes(_read_box(manifest, packs, spec, box).tobytes())
    begin, end = box.offset[0], box.offset[0] + box.shape[0]
    pieces = list(flat_boxes(spec.shape, begin, end))
    assert [flat_index(spec.shape, p.offset) for p in pieces] == [
        begin + done for done in itertools.accumulate([0, *(p.size for p in pieces[:-1])])
    ]
    return b"".join(_read_box(manifest, packs, spec, piece).tobytes() for piece in pieces)


def _check_any_to_any(data: st.DataObject) -> None:
    shapes = st.lists(st.integers(0, 14) | st.sampled_from([1001, 64]), max_size=3)
    shape = tuple(data.draw(shapes.filter(lambda s: math.prod(s) < MAX_ITEMS)))
    spec = TensorSpec("t", data.draw(st.sampled_from(sorted(DTYPES))), shape)
    random = np.random.default_rng(0).integers(0, 256, spec.size_bytes, dtype=np.uint8)
    whole = random.view(DTYPES[spec.dtype]).reshape(shape)

    @st.composite
    def held_by_ranks(draw: st.DrawFn) -> Held:
        return _held(draw, spec)

    held = data.draw(held_by_ranks())
    contents = {f: _of(whole, f).tobytes() for mine in held for f in mine}
    manifest, packs = _save(held, contents)
    assert sum(map(len, packs)) == spec.size_bytes
    for mine in data.draw(held_by_ranks()):
        for wanted in mine:
            assert _read(manifest, packs, wanted) == _of(whole, wanted).tobytes()


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_any_form_is_read_as_any_other(data: st.DataObject) -> None:
    _check_any_to_any(data)


@pytest.mark.slow
@pytest.mark.timeout(900)
@given(st.data())
@settings(max_examples=6000, deadline=None)
def test_any_form_is_read_as_any_other_many_times(data: st.DataObject) -> None:
    _check_any_to_any(data)


def _shard(whole: npt.NDArray[Any], layout: MeshLayout, coordinate: tuple[int, ...]) -> bytes:
    """What torch puts on a rank, by ``torch.chunk`` alone."""
    held = by_chunks(layout, coordinate)
    return bytes(whole[np.ix_(*(indices.numpy() for indices in held))].tobytes())


def _check_meshes(data: st.DataObject) -> None:
    source = data.draw(mesh_layouts(max_ranks=16).filter(lambda x: math.prod(x.shape) < MAX_ITEMS))
    target = data.draw(mesh_layouts(max_ranks=16, shape=source.shape))
    spec = TensorSpec("t", "BF16", source.shape)
    whole = np.arange(math.prod(source.shape)).astype("u2").reshape(source.shape)
    held: Held = []
    contents: Bytes = {}
    for coordinate, box in zip(source.coordinates(), source.boxes(), strict=True):
        held.append([Fragment(spec, box)] if box.size else [])
        contents[Fragment(spec, box)] = _shard(whole, source, coordinate)
    manifest, packs = _save(held, contents)
    for coordinate, box in zip(target.coordinates(), target.boxes(), strict=True):
        found = _read(manifest, packs, Fragment(spec, box))
        assert found == _shard(whole, target, coordinate)


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_shards_of_one_mesh_become_those_of_another(data: st.DataObject) -> None:
    _check_meshes(data)


@pytest.mark.slow
@pytest.mark.timeout(900)
@given(st.data())
@settings(max_examples=6000, deadline=None)
def test_shards_of_one_mesh_become_those_of_another_many_times(data: st.DataObject) -> None:
    _check_meshes(data)


@st.composite
def _boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """Boxes that tile a tensor, with or without damage."""
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=3)))
    boxes = _tiles(draw, TensorSpec("t", "U8", shape).whole, 4)
    if draw(st.booleans()):
        number = draw(st.integers(0, len(boxes) - 1))
        offset = tuple(draw(st.integers(0, n - 1)) for n in shape)
        room = [n - o for n, o in zip(shape, offset, strict=True)]
        boxes[number] = Box(offset, tuple(draw(st.integers(1, n)) for n in room))
    return shape, draw(st.permutations(boxes))


@given(_boxes())
@settings(max_examples=300, deadline=None)
def test_coverage_is_what_counting_every_item_says(
    case: tuple[tuple[int, ...], list[Box]],
) -> None:
    shape, boxes = case
    times = np.zeros(shape, int)
    for box in boxes:
        times[_slices(box)] += 1
    spec = TensorSpec("t", "U8", shape)
    if (times == 1).all():
        check_boxes(shape, boxes)
        assert set(layout_of(Fragment(spec, b) for b in boxes).cells()) == set(boxes)
        return
    with pytest.raises(ValueError, match="item") as caught:
        check_boxes(shape, boxes)
    words = str(caught.value)
    item = tuple(int(i) for i in words[words.index("[") + 1 : words.index("]")].split(",") if i)
    assert f"by {times[item]} of its boxes" in words
    assert times[item] != 1
    if boxes and len(set(boxes)) == len(boxes):
        with pytest.raises(LayoutError):
            layout_of(Fragment(spec, box) for box in boxes)
