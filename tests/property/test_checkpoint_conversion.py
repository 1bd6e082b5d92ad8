"""Conversion specs: union equals its slow reference, extract and union are inverse."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.checkpoint.convert.converted import Converted
from everstep.checkpoint.convert.plan import plan_extract, plan_union
from everstep.checkpoint.convert.source import read_box
from everstep.checkpoint.convert.spec import Spec
from everstep.checkpoint.layout import Box, flat_boxes
from tests.support.conversions import (
    DTYPES,
    Arrays,
    ArraySource,
    carried_out,
    union_reference,
)


@dataclass(frozen=True)
class Case:
    """A spec of one rule and logical tensors that it fits."""

    spec: Spec
    logical: Arrays


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any chain of steps, over shapes that rarely divide evenly; sizes given or to be found."""
    dims = draw(st.integers(1, 3))
    count = draw(st.integers(1, 3))
    rule: dict[str, Any] = {"stored": "s.{layer#}"}
    way = draw(st.sampled_from([None, "sharded", "replicated", "average", "flat"]))
    extent = st.integers(1, 5)
    if way == "flat":
        shapes = [tuple(draw(st.lists(extent, max_size=3))) for _ in range(count)]
        rule["flat"] = {"shapes": shapes} if draw(st.booleans()) else {}
    else:
        fused_dim = draw(st.integers(0, dims - 1))
        base = draw(st.lists(extent, min_size=dims, max_size=dims))
        count = draw(st.integers(1, 3)) if draw(st.booleans()) else 1
        sizes = draw(st.lists(extent, min_size=count, max_size=count))
        shapes = [(*base[:fused_dim], n, *base[fused_dim + 1 :]) for n in sizes]
        if count > 1 or draw(st.booleans()):
            rule["fused"] = {"dim": fused_dim}
            if draw(st.booleans()):
                rule["fused"]["sizes"] = sizes
        whole = (*base[:fused_dim], sum(sizes), *base[fused_dim + 1 :])
        order = list(range(dims))
        if draw(st.booleans()):
            order = draw(st.permutations(order))
            rule["transposed"] = order
        stored = [whole[order.index(d)] for d in range(dims)]
        if draw(st.booleans()):
            dim = draw(st.integers(0, dims - 1))
            rule["padded"] = {"dim": dim, "to": stored[dim] + draw(st.integers(0, 4))}
            if draw(st.booleans()):
                rule["padded"]["size"] = stored[dim]
        if way == "sharded":
            rule["sharded"] = draw(st.integers(0, dims - 1))
        elif way is not None:
            rule[way] = True
    if way is not None:
        rule |= {"stored": "r{rank#2}/s.{layer#}", "over": "rank", "parts": draw(st.integers(1, 4))}
    rule["logical"] = [f"t{i}.{{layer#}}" for i in range(len(shapes))]
    dtype = draw(st.sampled_from(["F32", "F64", "F16"] + (["U8", "BF16"] * (way != "average"))))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    logical = {
        f"t{i}.{layer}": random.integers(1, 100, shape).astype(DTYPES[dtype])
        for layer in range(draw(st.integers(1, 2)))
        for i, shape in enumerate(shapes)
    }
    return Case(Spec.model_validate({"name": "test", "rules": [rule]}), logical)


@given(cases())
@settings(max_examples=250, deadline=None)
def test_extract_then_union_is_the_identity(case: Case) -> None:
    inventory = ArraySource(case.logical).tensors
    stored = carried_out(plan_extract(case.spec, inventory), case.logical)
    union = plan_union(case.spec, ArraySource(stored).tensors, inventory)
    found = carried_out(union, stored)
    assert found.keys() == case.logical.keys()
    for name, array in case.logical.items():
        np.testing.assert_array_equal(found[name], array)

    reference = union_reference(case.spec, stored, {n: a.shape for n, a in case.logical.items()})
    for name, array in reference.items():
        np.testing.assert_array_equal(found[name], array)
    again = carried_out(plan_extract(case.spec, union.tensors), found)
    for name, array in stored.items():
        np.testing.assert_array_equal(again[name], array)


@given(cases(), st.data())
@settings(max_examples=150, deadline=None)
def test_any_box_of_what_is_made(case: Case, data: st.DataObject) -> None:
    inventory = ArraySource(case.logical).tensors
    stored = carried_out(plan_extract(case.spec, inventory), case.logical)
    source = ArraySource(stored)
    converted = Converted(plan_union(case.spec, source.tensors, inventory), source)
    name = data.draw(st.sampled_from(sorted(case.logical)))
    shape = case.logical[name].shape
    offset = tuple(data.draw(st.integers(0, n)) for n in shape)
    box = Box(
        offset, tuple(data.draw(st.integers(0, n - o)) for n, o in zip(shape, offset, strict=True))
    )
    found = read_box(converted, name, box).view(case.logical[name].dtype).reshape(box.shape)
    index = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
    np.testing.assert_array_equal(found, case.logical[name][index])
    most = box.size * max(1, len(stored))
    assert sum(source.read_items.values()) <= most  # nothing besides what is asked for


@given(st.lists(st.integers(0, 5), max_size=4).map(tuple), st.data())
@settings(max_examples=200, deadline=None)
def test_a_range_is_few_boxes_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    size = math.prod(shape)
    begin = data.draw(st.integers(0, size))
    end = data.draw(st.integers(begin, size))
    numbers = np.arange(size).reshape(shape)
    boxes = list(flat_boxes(shape, begin, end))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert _items(numbers, boxes) == list(range(begin, end))


def _items(numbers: np.ndarray[Any, Any], boxes: list[Box]) -> list[int]:
    found: list[int] = []
    for box in boxes:
        index = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
        found += numbers[index].reshape(-1).tolist()
    return found
