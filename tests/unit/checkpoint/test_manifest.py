"""Parts and the manifest made of them."""

import json
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from everstep.checkpoint.errors import CoverageError, LayoutError, ManifestError
from everstep.checkpoint.layout import Box, Fragment, TensorSpec
from everstep.checkpoint.manifest import (
    Lineage,
    Manifest,
    Part,
    build_manifest,
    decode_manifest,
    decode_part,
    encode_manifest,
    encode_part,
)
from everstep.checkpoint.pack import PackRecord, plan_pack
from everstep.checkpoint.records import decode_record, encode_record
from everstep.checkpoint.reshard import plan_save
from tests.support.fragments import flat_fragment

W = TensorSpec("model.w", "F32", (7, 4))
S = TensorSpec("model.s", "I64", ())
E = TensorSpec("model.empty", "BF16", (0, 3))
ROWS = [Box((0, 0), (4, 4)), Box((4, 0), (3, 4))]
B = TensorSpec("model.boxes", "U8", (2, 3))
F = TensorSpec("model.flat", "F16", (5, 3))


def _part(rank: int, fragments: list[Fragment], world_size: int = 2) -> Part:
    plan = plan_pack(rank, fragments)
    return Part(
        generation=3,
        step=40,
        rank=rank,
        world_size=world_size,
        pack=PackRecord(
            file=f"rank-{rank:05d}-ab12.safetensors",
            rank=rank,
            size_bytes=plan.size_bytes,
            data_start=len(plan.header),
            data_bytes=plan.data_bytes,
            crc32c=12345,
        ),
        fragments=plan.fragments,
        context={"mesh": {"dp": 2}, "producer": {"torch": "2"}, "objects": {"a": [1]}}
        if rank == 0
        else {},
    )


def _parts() -> list[Part]:
    first = [Fragment(W, ROWS[0]), Fragment(S, S.whole), Fragment(E, E.whole)]
    return [_part(0, first), _part(1, [Fragment(W, ROWS[1])])]


def _manifest() -> Manifest:
    return build_manifest(_parts())


def _irregular() -> list[Part]:
    """A list of boxes, two of them in one pack, and flat ranges."""
    boxes = [Box((0, 0), (1, 3)), Box((1, 0), (1, 1)), Box((1, 1), (1, 2))]
    first = [Fragment(B, boxes[0]), Fragment(B, boxes[2]), flat_fragment(F, 0, 7)]
    return [_part(0, first), _part(1, [Fragment(B, boxes[1]), flat_fragment(F, 7, 15)])]


def test_the_manifest_says_what_the_parts_said() -> None:
    manifest = _manifest()
    assert (manifest.generation, manifest.step, manifest.mesh) == (3, 40, {"dp": 2})
    assert manifest.objects == {"a": [1]}
    assert list(manifest.tensors) == ["model.empty", "model.s", "model.w"]
    weight = manifest.tensors["model.w"]
    assert (weight.packs, list(weight.grid.cells())) == ((0, 1), ROWS)
    assert manifest.tensors["model.s"].packs == (0,)
    assert manifest.tensors["model.empty"].packs == ()
    assert manifest.size_bytes == sum(p.pack.size_bytes for p in _parts())


def test_it_does_not_depend_on_the_order_of_the_parts() -> None:
    assert encode_manifest(build_manifest(_parts()[::-1])) == encode_manifest(_manifest())


def test_there_and_back() -> None:
    for part in _parts():
        assert decode_part(encode_part(part), "p") == part
    data = encode_manifest(_manifest())
    assert decode_manifest(data, "m") == _manifest()
    assert encode_manifest(decode_manifest(data, "m")) == data


def test_boxes_and_flat_ranges_there_and_back() -> None:
    for part in _irregular():
        assert decode_part(encode_part(part), "p") == part
    manifest = build_manifest(_irregular())
    data = encode_manifest(manifest)
    coded = json.loads(data)["tensors"]
    assert coded["model.boxes"]["boxes"] == [[[0, 0], [1, 3]], [[1, 0], [1, 1]], [[1, 1], [1, 2]]]
    assert coded["model.boxes"]["packs"] == [[0, 2, 1], [0, 1, 0]]
    assert coded["model.flat"]["flat"] == [7]
    assert decode_manifest(data, "m") == manifest
    assert manifest.starts("model.flat") == [0, 0]
    assert manifest.starts("model.boxes") == [14, 16, 17]
    with pytest.raises(LayoutError, match=r"'model\.flat' is stored as FlatRanges"):
        _ = manifest.tensors["model.flat"].grid


@pytest.mark.parametrize("lineage", [Lineage(None, None), Lineage(2, 30)], ids=str)
def test_a_manifest_tells_of_its_lineage(lineage: Lineage) -> None:
    data = encode_manifest(build_manifest(_parts(), lineage))
    assert json.loads(data)["lineage"] == lineage._asdict()
    assert decode_manifest(data, "m").lineage == lineage
    assert decode_manifest(encode_manifest(_manifest()), "m").lineage is None


@pytest.mark.parametrize("make", [_parts, _irregular])
def test_places_in_a_pack_follow_from_the_manifest_alone(make: Callable[[], list[Part]]) -> None:
    parts, manifest = make(), decode_manifest(encode_manifest(build_manifest(make())), "m")
    for part, index in zip(parts, manifest.pack_indexes, strict=True):
        plan = plan_pack(part.rank, part.fragments)
        for fragment, start in zip(plan.fragments, plan.starts, strict=True):
            if fragment.size_bytes:
                assert index.starts[fragment.spec.name, fragment.box.offset] == (start, fragment)
                stored = manifest.tensors[fragment.spec.name]
                cell = list(stored.layout.cells()).index(fragment.box)
                assert stored.packs[cell] == part.rank
                assert manifest.starts(fragment.spec.name)[cell] == start


def _change(index: int, **facts: Any) -> Callable[[list[Part]], None]:
    def change(parts: list[Part]) -> None:
        parts[index] = replace(parts[index], **facts)

    return change


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda parts: parts.clear(), ValueError),
        (lambda parts: parts.pop(0), ValueError),
        (lambda parts: parts.pop(1), ValueError),
        (lambda parts: parts.append(parts[0]), ValueError),
        (_change(1, step=41), ValueError),
        (_change(1, generation=4), ValueError),
        (_change(1, world_size=3), ValueError),
        (_change(1, fragments=()), LayoutError),
        (_change(1, fragments=(Fragment(W, ROWS[0]),)), LayoutError),
        (_change(1, fragments=(Fragment(replace(W, dtype="I32"), W.whole),)), LayoutError),
    ],
)
def test_parts_that_make_no_whole(
    change: Callable[[list[Part]], None], error: type[Exception]
) -> None:
    parts = _parts()
    change(parts)
    with pytest.raises(error):
        build_manifest(parts)


def _edited(data: bytes, kind: str, edit: Callable[[dict[str, Any]], Any]) -> bytes:
    members = decode_record(data, kind, 1, "m")
    members.pop("crc32c", None)
    version = members.pop(kind)
    edit(members)
    return encode_record(kind, version, members)


def _put(*path: Any) -> Callable[[dict[str, Any]], None]:
    *way, last, value = path

    def edit(members: Any) -> None:
        for key in way:
            members = members[key]
        if value is DELETED:
            del members[last]
        else:
            members[last] = value

    return edit


DELETED = object()
MANIFEST_DEFECTS = [
    *[_put(name, DELETED) for name in ("generation", "step", "mesh", "producer", "objects")],
    *[_put(name, DELETED) for name in ("block_bytes", "packs", "tensors")],
    *[_put("step", value) for value in (-1, True, 1.0, "4", None, 2**60)],
    _put("generation", []),
    _put("mesh", {"dp": -2}),
    _put("mesh", [2]),
    _put("producer", {"torch": 2}),
    _put("objects", [1]),
    _put("block_bytes", 4096),
    _put("packs", {}),
    _put("packs", [1]),
    _put("packs", []),
    _put("packs", 0, "kind", "zip"),
    _put("packs", 0, "crc32c", DELETED),
    _put("packs", 0, "file", "../../../etc/passwd"),
    _put("packs", 0, "file", "/etc/passwd"),
    _put("packs", 0, "file", ".hidden"),
    _put("packs", 0, "file", "a/b"),
    _put("packs", 0, "file", ""),
    _put("packs", 0, "file", "rank-00001-ab12.safetensors"),
    _put("packs", 0, "data_start", 0),
    _put("packs", 0, "data_start", 4097),
    _put("packs", 0, "data_bytes", 8),
    _put("packs", 0, "size_bytes", 8),
    _put("tensors", []),
    _put("tensors", "model.s", None),
    _put("tensors", "model.s", "dtype", DELETED),
    _put("tensors", "model.s", "dtype", "F31"),
    _put("tensors", "model.s", "dtype", ["F32"]),
    _put("tensors", "model.s", DELETED),
    _put("tensors", "more", {"dtype": "F32", "shape": [], "grid": [], "packs": [[0, 1, 0]]}),
    _put("tensors", "\ud800", {"dtype": "F32", "shape": [0], "grid": [1], "packs": []}),
    _put("tensors", "model.w", "shape", [7]),
    _put("tensors", "model.w", "shape", [7, -4]),
    _put("tensors", "model.w", "shape", [7, 5]),
    _put("tensors", "model.w", "shape", [1] * 33),
    _put("tensors", "model.w", "grid", [3, 4]),
    _put("tensors", "model.w", "grid", [4]),
    _put("tensors", "model.w", "packs", [[0, 1, 0]]),
    _put("tensors", "model.w", "packs", [[0, 2, 0]]),
    _put("tensors", "model.w", "packs", [[1, 2, -1]]),
    _put("tensors", "model.w", "packs", [[0, 2, 2]]),
    _put("tensors", "model.w", "packs", [[0, 2, -1]]),
]


@pytest.mark.parametrize("edit", MANIFEST_DEFECTS)
def test_a_defect_in_a_manifest_is_a_named_error(edit: Callable[[dict[str, Any]], None]) -> None:
    data = _edited(encode_manifest(_manifest()), "everstep_manifest", edit)
    with pytest.raises(ManifestError, match=r"^dir/manifest\.json is damaged: "):
        decode_manifest(data, "dir/manifest.json")


IRREGULAR_DEFECTS = [
    _put("tensors", "model.boxes", "boxes", DELETED),
    _put("tensors", "model.boxes", "boxes", []),
    _put("tensors", "model.boxes", "boxes", 1, [[1, 0], [1, 2]]),
    _put("tensors", "model.boxes", "boxes", 1, [[1, 0], [1, 0]]),
    _put("tensors", "model.boxes", "boxes", 1, [[1, 0], [1]]),
    _put("tensors", "model.boxes", "boxes", 1, [[1], [1]]),
    _put("tensors", "model.boxes", "boxes", 1, [[1, 0]]),
    _put("tensors", "model.boxes", "boxes", 1, [[1, 0], [1, -1]]),
    _put("tensors", "model.boxes", "boxes", 1, [[1, 0], [2, 1]]),
    _put("tensors", "model.boxes", "boxes", 2, [[1, 1], [1, 1]]),
    _put("tensors", "model.boxes", "boxes", 0, [[1, 2], [1, 1]]),
    _put("tensors", "model.boxes", "shape", [2, 4]),
    _put("tensors", "model.boxes", "shape", [0, 4]),
    _put("tensors", "model.boxes", "packs", [[0, 2, 1]]),
    _put("tensors", "model.flat", "grid", [5, 3]),
    _put("tensors", "model.flat", "flat", DELETED),
    _put("tensors", "model.flat", "flat", [15]),
    _put("tensors", "model.flat", "flat", [8, 7]),
    _put("tensors", "model.flat", "flat", 0),
    _put("tensors", "model.flat", "flat", "7"),
    _put("tensors", "model.flat", "shape", [5, 4]),
    _put("tensors", "model.flat", "shape", [2**40, 2**40]),
    _put("lineage", None),
    _put("lineage", {"parent": 1}),
    _put("lineage", {"parent": 1, "fork_step": None}),
    _put("lineage", {"parent": None, "fork_step": 1}),
    _put("lineage", {"parent": 3, "fork_step": 1}),
    _put("lineage", {"parent": 0, "fork_step": 1}),
    _put("lineage", {"parent": True, "fork_step": 1}),
    _put("lineage", {"parent": 1, "fork_step": -1}),
]


@pytest.mark.parametrize("edit", IRREGULAR_DEFECTS)
def test_a_defect_in_an_irregular_layout_is_a_named_error(
    edit: Callable[[dict[str, Any]], None],
) -> None:
    good = encode_manifest(build_manifest(_irregular(), Lineage(2, 5)))
    with pytest.raises(ManifestError, match=r"^dir/manifest\.json is damaged: "):
        decode_manifest(_edited(good, "everstep_manifest", edit), "dir/manifest.json")


def test_packs_of_another_size_than_their_tensors_say() -> None:
    edit = _put("tensors", "model.w", "packs", [[1, 2, -1]])
    with pytest.raises(CoverageError, match="bytes, not"):
        decode_manifest(_edited(encode_manifest(_manifest()), "everstep_manifest", edit), "m")


PART_DEFECTS = [
    *[_put(name, DELETED) for name in ("generation", "rank", "pack", "fragments", "context")],
    _put("rank", 2),
    _put("world_size", 0),
    _put("context", None),
    _put("pack", []),
    _put("pack", "file", "/x"),
    _put("pack", "data_bytes", 1),
    _put("fragments", 3),
    _put("fragments", "cells", 3),
    _put("fragments", "rows", 3),
    _put("fragments", "rows", [[]]),
    _put("fragments", "rows", 0, 0, 3),
    _put("fragments", "rows", 0, 0, [3]),
    _put("fragments", "rows", 0, 1, "F31"),
    _put("fragments", "rows", 0, 2, -1),
    _put("fragments", "rows", 0, 2, 3),
    _put("fragments", "rows", 0, 2, True),
    _put("fragments", "cells", 0, 0, [[1]]),
    _put("fragments", "cells", 0, 1, [0, 0]),
    _put("fragments", "cells", 1, 1, [4, 0]),
    _put("fragments", "cells", 1, 2, [4]),
    _put("fragments", "cells", 1, [[7, 4], 0, 29]),
    _put("fragments", "cells", 1, [[7, 4], 9, 8]),
    _put("fragments", "cells", 1, [[7, 4], 0, [1]]),
]


@pytest.mark.parametrize("edit", PART_DEFECTS)
def test_a_defect_in_a_part_is_a_named_error(edit: Callable[[dict[str, Any]], None]) -> None:
    data = _edited(encode_part(_parts()[0]), "everstep_part", edit)
    with pytest.raises(ManifestError, match=r"^dir/00000\.json is damaged: "):
        decode_part(data, "dir/00000.json")


@pytest.mark.parametrize(
    "tensor",
    [
        {"shape": [2**59], "grid": [1], "packs": [[0, 2**59, 0]]},
        {"shape": [2**59], "grid": [2**59], "packs": [[0, 2**59, 0]]},
        {"shape": [0, 2**50], "grid": [1, 1], "packs": []},
        {"shape": [2**20] * 8, "grid": [1] * 8, "packs": [[0, 2**40, 0]] * 100},
        {"shape": [2**59], "flat": 1, "packs": [[0, 2**59, 0]]},
        {"shape": [2] * 32, "boxes": [[[0] * 32, [1] * 32]] * 2, "packs": [[0, 2, 0]]},
    ],
    ids=["cells", "runs", "empty", "dims", "flat", "corners"],
)
def test_bombs_are_refused_in_little_memory_and_time(tensor: dict[str, Any]) -> None:
    edit = _put("tensors", {f"t{i}": {"dtype": "U8", **tensor} for i in range(100)})
    data = _edited(encode_manifest(_manifest()), "everstep_manifest", edit)
    begun_s = time.process_time()
    tracemalloc.start()
    with pytest.raises(ManifestError):
        decode_manifest(data, "m")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2**22
    assert time.process_time() - begun_s < 2


def test_many_tensors_in_many_packs_stay_bounded() -> None:
    packs = [
        {"kind": "safetensors", "file": f"p{i}", "rank": i, "size_bytes": 4096, "data_start": 4096}
        | {"data_bytes": 0, "crc32c": 0}
        for i in range(3000)
    ]
    full = {"dtype": "U8", "shape": [3000], "grid": [1], "packs": [[0, 3000, 1]]}
    members = json.loads(encode_manifest(_manifest()))
    members |= {"packs": packs, "tensors": {f"t{i}": full for i in range(3000)}}
    del members["crc32c"], members["everstep_manifest"]
    with pytest.raises(ManifestError, match="more than 4194304 cells"):
        decode_manifest(encode_record("everstep_manifest", 1, members), "m")


def test_replicated_tensors_are_in_one_pack_each() -> None:
    layout = [Fragment(S, S.whole), Fragment(W, W.whole)]
    owned = plan_save([layout, layout])
    manifest = build_manifest([_part(rank, owned[rank]) for rank in range(2)])
    assert sorted(t.packs for t in manifest.tensors.values()) == [(0,), (1,)]
