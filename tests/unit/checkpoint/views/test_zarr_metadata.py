"""Names and types in Zarr."""

import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given
from hypothesis import strategies as st

from everstep.checkpoint.layout import ITEM_BYTES
from everstep.checkpoint.views.zarr_metadata import (
    CORE_TYPES,
    TENSORSTORE_TYPES,
    array_metadata,
    node_name,
    zarr_type,
)


@pytest.mark.parametrize(
    ("name", "node"),
    [
        ("model.layers.0.weight", "model.layers.0.weight"),
        ("a/b", "a%2Fb"),
        ("100%", "100%25"),
        ("__x", "%5F_x"),
        ("..", "%2E%2E"),
        (".", "%2E"),
        ("", "%"),
        ("zarr.json", "zarr%2Ejson"),
    ],
)
def test_names(name: str, node: str) -> None:
    assert node_name(name) == node


@given(st.text("./%_2F5E", max_size=6), st.text("./%_2F5E", max_size=6))
def test_no_two_names_become_one(a: str, b: str) -> None:
    assert (node_name(a) == node_name(b)) == (a == b)


@given(st.text("./%_ab"))
def test_names_are_allowed(name: str) -> None:
    node = node_name(name)
    assert node
    assert node.strip(".")
    assert "/" not in node
    assert not node.startswith("__")


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_tensorstore_knows_the_types_and_a_gap_is_no_number(dtype: str) -> None:
    kind = zarr_type(dtype, TENSORSTORE_TYPES)
    metadata = array_metadata((2,), (1,), kind, {})
    spec = {"driver": "zarr3", "kvstore": "memory://", "metadata": metadata}
    array = ts.open(spec, create=True, context=ts.Context()).result()
    assert array.dtype.numpy_dtype.itemsize == ITEM_BYTES[dtype]
    nothing = array.read().result()
    if isinstance(kind.fill, str | list):
        assert np.isnan(nothing).all()


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_what_zarr_python_does_not_know_is_shown_as_bits(dtype: str) -> None:
    known, shown = zarr_type(dtype, TENSORSTORE_TYPES), zarr_type(dtype, CORE_TYPES)
    if known != shown:
        assert shown.name == f"uint{8 * ITEM_BYTES[dtype]}"
        bits = np.array([shown.fill], f"u{ITEM_BYTES[dtype]}")
        assert np.isnan(bits.view(ts.dtype(known.name).numpy_dtype)).all()
