"""A checkpoint in DCP's terms, decoded from any JSON."""

import enum
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.checkpoint.errors import ManifestError, StateError
from everstep.checkpoint.layout import Box, Fragment, TensorSpec
from everstep.checkpoint.manifest import Manifest, Part, build_manifest
from everstep.checkpoint.pack import PackRecord
from everstep.checkpoint.plain_json import from_json
from everstep.checkpoint.views.dcp_contents import (
    MAX_PLAIN_BYTES,
    contents_of,
    dcp_objects,
    is_plain,
    plain_form,
    plain_value,
    spread,
)

SPECS = (TensorSpec("t", "F32", (2,)), TensorSpec("bytes", "U8", (5,)))


def _manifest(objects: Any) -> Manifest:
    fragments = tuple(Fragment(spec, spec.whole) for spec in SPECS)
    size = sum(f.size_bytes for f in fragments)
    part = Part(
        generation=1,
        step=0,
        rank=0,
        world_size=1,
        pack=PackRecord(
            file="p", rank=0, size_bytes=size, data_start=4096, data_bytes=size, crc32c=0
        ),
        fragments=fragments,
        context={"mesh": {}, "producer": {}, "objects": objects},
    )
    return build_manifest([part])


def test_what_is_written_is_read() -> None:
    paths = {"t": ("t",), "bytes": ("a", 3), "n": ("n",)}
    found = contents_of(_manifest(dcp_objects({"n": 1}, ["bytes"], paths)), "here")
    assert (list(found.tensors), list(found.raw), found.paths) == (["t"], ["bytes"], paths)
    assert plain_value(found, "n", "here") == 1


def test_a_run_has_names_too() -> None:
    found = contents_of(_manifest({"optimizer": {"groups": []}, "object.data": 3}), "here")
    assert list(found.tensors) == ["bytes", "t"]
    assert found.plain == {"object.optimizer": {"groups": []}, "object.data": 3}
    assert found.paths["object.data"] == ("object", "data")


@pytest.mark.parametrize(
    "value",
    [
        3,
        [],
        {},
        {"paths": {}, "plain": {}},
        {"paths": {}, "plain": {}, "bytes": ["none"]},
        {"paths": {}, "plain": {}, "bytes": ["t"]},
        {"paths": {}, "plain": {}, "bytes": [["t"]]},
        {"paths": {}, "plain": {"t": 1}, "bytes": []},
        {"paths": {}, "plain": 3, "bytes": []},
        {"paths": {"$no": 1}, "plain": {}, "bytes": []},
        {"paths": {"t": {"$tuple": ["a", 10**9]}}, "plain": {}, "bytes": []},
        {"paths": {"t": {"$tuple": ["a", -1]}}, "plain": {}, "bytes": []},
    ],
)
def test_other_objects_are_refused(value: Any) -> None:
    with pytest.raises(ManifestError):
        contents_of(_manifest({"dcp": value}), "here")


def test_a_plain_object_that_is_none() -> None:
    found = contents_of(_manifest(dcp_objects({"n": {"$no": 1}}, [], {})), "here")
    with pytest.raises(ManifestError):
        plain_value(found, "n", "here")


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.booleans(), inner)
    ),
    max_leaves=20,
)


@given(_VALUES)
def test_plain_values_come_back_exactly(value: Any) -> None:
    form = plain_form(value, "name")
    assert form is not None
    found = from_json(form[0])
    assert repr(found) == repr(value)  # NaN, -0.0, True against 1, order
    assert is_plain(found)


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    "value",
    [
        1j,
        {1},
        b"",
        Colour.RED,
        np.float64(1),
        OrderedDict(a=1),
        [Colour.RED],
        {"a": (Colour.RED,)},
        {Colour.RED: 1},
        "x" * MAX_PLAIN_BYTES,
    ],
)
def test_other_values_are_not_plain(value: Any) -> None:
    assert plain_form(value, "name") is None


def test_deep_values_are_not_plain() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    assert plain_form(value, "name") is None


def test_planner_data_must_be_plain() -> None:
    with pytest.raises(StateError):
        dcp_objects({}, [], {"a": object()})


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), unique=True))
def test_no_two_boxes_of_a_tensor_share_a_pack(boxes: list[tuple[str, int]]) -> None:
    fragments = [Fragment(TensorSpec(n, "F32", (10,)), Box((i,), (1,))) for n, i in boxes]
    packs = spread(fragments)
    assert sorted(f for pack in packs for f in pack) == sorted(fragments)
    for pack in packs:
        assert len({f.spec.name for f in pack}) == len(pack)
    most = max((sum(n == name for n, _ in boxes) for name in "abc"), default=0)
    assert len(packs) == max(1, most)
