"""Fragments of many tensors as compact JSON (pure)."""

import math
import reprlib
from collections.abc import Iterable
from typing import Any

from everstep.checkpoint.json_checks import dtype, extents, mapping, natural, text
from everstep.checkpoint.layout import Box, Fragment, TensorSpec

SpecPool = dict[tuple[str, str, tuple[int, ...]], TensorSpec]


def fragments_to_json(fragments: Iterable[Fragment]) -> dict[str, Any]:
    """Fragments as JSON: those of many tensors are cut alike, which is said once.

    ``cells`` holds for each way [global shape, offset, shape], or [global shape, begin, end] of a
    flat range; ``rows`` holds for each fragment [name, dtype, number of its cell].
    """
    cells: dict[tuple[tuple[int, ...], Box, bool], int] = {}
    rows = [
        [spec.name, spec.dtype, cells.setdefault((spec.shape, box, flat), len(cells))]
        for spec, box, flat in fragments
    ]
    return {
        "cells": [
            [shape, box.offset[0], box.offset[0] + box.shape[0]] if flat else [shape, *box]
            for shape, box, flat in cells
        ],
        "rows": rows,
    }


def fragments_from_json(coded: Any, known: SpecPool | None = None) -> tuple[Fragment, ...]:
    """Inverse of ``fragments_to_json``; raises KeyError, TypeError or ValueError.

    Args:
        coded: what was decoded from JSON.
        known: tensors that other ranks have told of, which become the same objects; extended.
    """
    specs: SpecPool = {} if known is None else known
    cells = [_decode_cell(*cell) for cell in mapping(coded)["cells"]]
    found = []
    for name, dtype_name, number in coded["rows"]:
        if type(number) is not int or not 0 <= number < len(cells):
            raise ValueError(f"{name!r} has cell {reprlib.repr(number)} of {len(cells)}")
        shape, box, flat = cells[number]
        spec = specs.get((name, dtype_name, shape))
        if spec is None:
            spec = TensorSpec(text(name), dtype(dtype_name), shape)
            specs[name, dtype_name, shape] = spec
        found.append(Fragment(spec, box, flat))
    return tuple(found)


def _decode_cell(coded_shape: Any, first: Any, second: Any) -> tuple[tuple[int, ...], Box, bool]:
    global_shape = extents(coded_shape)
    if type(first) is int:
        if not natural(first) <= natural(second) <= math.prod(global_shape):
            raise ValueError(f"[{first}, {second}) is no range of a flat tensor")
        return global_shape, Box((first,), (second - first,)), True
    offset, shape = extents(first), extents(second)
    if not len(global_shape) == len(offset) == len(shape) or any(
        o + n > e for o, n, e in zip(offset, shape, global_shape, strict=True)
    ):
        raise ValueError("a box leaves its tensor, or has other dims")
    return global_shape, Box(offset, shape), False
