"""Decoders of manifests, parts and generations: a whole valid object or a named error, ever."""

import copy
import json
import tracemalloc
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.checkpoint.errors import EverstepError, ManifestError
from everstep.checkpoint.grid_codec import decode_bounds, decode_runs, encode_bounds, encode_runs
from everstep.checkpoint.layout import Box, Fragment, TensorSpec
from everstep.checkpoint.lineage import Generation, decode_generation, encode_generation
from everstep.checkpoint.manifest import (
    Lineage,
    Part,
    build_manifest,
    decode_manifest,
    decode_part,
    encode_manifest,
    encode_part,
)
from everstep.checkpoint.pack import PackRecord, plan_pack
from everstep.checkpoint.plain_json import from_json, to_json
from everstep.checkpoint.records import encode_record
from everstep.checkpoint.reshard import plan_load
from tests.support.fragments import flat_fragment


def _part(rank: int) -> Part:
    weight, scalar = TensorSpec("model.w", "F32", (5, 4)), TensorSpec("model.s", "I64", ())
    boxes, flat = TensorSpec("model.b", "U8", (2, 3)), TensorSpec("model.f", "F16", (3, 3))
    of_boxes = [Box((0, 0), (1, 3)), Box((1, 1), (1, 2))] if rank == 0 else [Box((1, 0), (1, 1))]
    held = [
        Fragment(weight, Box((3 * rank, 0), (3 - rank, 4))),
        *(Fragment(boxes, box) for box in of_boxes),
        flat_fragment(flat, 4 * rank, 4 + 5 * rank),
        *([] if rank else [Fragment(scalar, scalar.whole)]),
    ]
    plan = plan_pack(rank, held)
    return Part(
        generation=2,
        step=30,
        rank=rank,
        world_size=2,
        pack=PackRecord(
            file=f"rank-{rank:05d}-aa.safetensors",
            rank=rank,
            size_bytes=plan.size_bytes,
            data_start=len(plan.header),
            data_bytes=plan.data_bytes,
            crc32c=77,
        ),
        fragments=plan.fragments,
        context={"mesh": {"dp": 2}, "producer": {"torch": "2"}, "objects": {"a": {"b": [1.5]}}}
        if rank == 0
        else {},
    )


GENERATION = Generation(number=2, parent=1, fork_step=5, created_s=1.5, mesh={"dp": 2})
RECORDS: dict[str, tuple[bytes, Callable[[bytes, str], Any]]] = {
    "everstep_manifest": (
        encode_manifest(build_manifest([_part(0), _part(1)], Lineage(1, 5))),
        decode_manifest,
    ),
    "everstep_part": (encode_part(_part(0)), decode_part),
    "everstep_generation": (encode_generation(GENERATION), decode_generation),
}
KINDS = st.sampled_from(sorted(RECORDS))


def _named_error(decode: Callable[[bytes, str], Any], data: bytes) -> ManifestError | None:
    """None where the bytes decode; no other exception is accepted."""
    try:
        decode(data, "f")
    except ManifestError as error:
        return error if error.path == "f" else None
    return None


@given(KINDS, st.data())
@settings(max_examples=300, deadline=None)
def test_changed_bytes_are_a_named_error(kind: str, data: st.DataObject) -> None:
    good, decode = RECORDS[kind]
    changed = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.integers(0, len(changed)))
        end = data.draw(st.integers(begin, min(begin + 8, len(changed))))
        changed[begin:end] = data.draw(st.binary(max_size=8))
    error = _named_error(decode, bytes(changed))
    assert error is not None or changed == good


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 2, 3, 4096, 2**20, 2**53, 2**60, 2**80, 10**400])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.sampled_from(["F32", "safetensors", "../x", "model.w", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(KINDS, st.data())
@settings(max_examples=600, deadline=None)
def test_other_content_under_a_right_checksum_is_valid_or_a_named_error(
    kind: str, data: st.DataObject
) -> None:
    good, decode = RECORDS[kind]
    members = json.loads(good)
    del members["crc32c"], members[kind]
    for _ in range(data.draw(st.integers(1, 3))):
        _change_something(members, data)
    version = data.draw(st.sampled_from([1, 1, 1, 2]))
    error = _named_error(decode, encode_record(kind, version, members))
    assert error is None or len(str(error)) < 2000


def _change_something(members: Any, data: st.DataObject) -> None:
    """Walk down to a random place and put a random value, or nothing, there."""
    while True:
        keys = list(members) if isinstance(members, dict) else list(range(len(members)))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        inner = members[key]
        if isinstance(inner, dict | list) and inner and data.draw(st.integers(0, 3)):
            members = inner
            continue
        if data.draw(st.booleans()):
            members[key] = data.draw(JSON_VALUES)
        elif isinstance(members, list) and data.draw(st.booleans()):
            members.append(copy.deepcopy(inner))
        else:
            del members[key]
        return


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_manifest_that_decodes_can_be_used(data: st.DataObject) -> None:
    """Whatever passes: cells have packs, places are inside the packs, encoding gives it back."""
    members = json.loads(RECORDS["everstep_manifest"][0])
    del members["crc32c"], members["everstep_manifest"]
    _change_something(members["tensors"], data)
    try:
        manifest = decode_manifest(encode_record("everstep_manifest", 1, members), "f")
    except EverstepError:
        return
    assert decode_manifest(encode_manifest(manifest), "f") == manifest
    for record, index in zip(manifest.packs, manifest.pack_indexes, strict=True):
        for start, fragment in index.starts.values():
            assert 0 <= start <= start + fragment.size_bytes <= record.data_bytes
    for stored in manifest.tensors.values():
        starts, item_bytes = manifest.starts(stored.spec.name), stored.spec.item_bytes
        copies = plan_load(stored.layout, stored.packs, starts, item_bytes, stored.spec.whole)
        assert sum(c.box.size for c in copies) == stored.spec.whole.size
        for found in copies:
            end = found.start + found.cell.size * item_bytes
            assert 0 <= found.start < end <= manifest.packs[found.pack].data_bytes


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_whatever_a_manifest_says_is_decoded_in_bounded_memory_and_stays_inside(
    data: st.DataObject,
) -> None:
    """Paths, sizes and layouts of any kind, under a checksum that is right."""
    members = json.loads(RECORDS["everstep_manifest"][0])
    del members["crc32c"], members["everstep_manifest"]
    name = data.draw(st.sampled_from(["model.b", "model.f", "model.w"]))
    members["packs"][0]["file"] = data.draw(
        st.sampled_from(["a", "../a", "/a", "a/b", "..", ".", "a\\b", "a\0", "C:a", "\u202ea"])
    )
    extent = st.sampled_from([0, 1, 2, 3, 9, 2**20, 2**31, 2**59, 2**60, -1])
    members["tensors"][name] = {
        "dtype": data.draw(st.sampled_from(["U8", "C128", "F4_X2"])),
        "shape": data.draw(st.lists(extent, max_size=3)),
        "packs": data.draw(st.lists(st.lists(extent, min_size=3, max_size=3), max_size=3)),
        data.draw(st.sampled_from(["grid", "flat", "boxes"])): data.draw(
            extent
            | st.lists(extent | st.lists(extent, max_size=3), max_size=3)
            | st.lists(st.lists(st.lists(extent, max_size=3), min_size=2, max_size=2), max_size=4)
        ),
    }
    record = encode_record("everstep_manifest", 1, members)
    tracemalloc.start()
    try:
        manifest = decode_manifest(record, "f")
    except ManifestError:
        pass
    else:
        assert manifest.packs[0].file == "a"
        assert sum(t.spec.size_bytes for t in manifest.tensors.values()) < 2**10
    finally:
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak_bytes < 2**20


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(0, 3))
def test_bounds_there_and_back(widths: list[int], more: int) -> None:
    bounds = (0, *(sum(widths[: i + 1]) for i in range(len(widths))))
    shape = (bounds[-1],)
    for several in ((bounds,), (bounds,) * (more + 1)):
        cells = max(1, len(widths)) ** len(several)
        assert decode_bounds(encode_bounds(several), shape * len(several), cells) == several


@given(st.lists(st.integers(0, 6), max_size=30))
def test_runs_there_and_back(values: list[int]) -> None:
    runs = encode_runs(values)
    assert decode_runs(runs, len(values), 7) == values
    assert len(runs) <= len(values)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.sampled_from(["$tuple"]), inner, max_size=3)
        | st.dictionaries(st.integers() | st.tuples(st.integers()), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(PLAIN)
def test_plain_values_there_and_back(value: Any) -> None:
    back = from_json(json.loads(json.dumps(to_json(value, "x"), allow_nan=False)))
    assert repr(back) == repr(value)


@given(JSON_VALUES)
def test_any_json_decodes_or_is_a_plain_error(value: Any) -> None:
    try:
        from_json(value)
    except (TypeError, ValueError):
        return
