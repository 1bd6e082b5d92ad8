"""Conversions for tests: arrays as a source, and the slow reference of what a spec means."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everstep.checkpoint.convert.converted import Converted
from everstep.checkpoint.convert.plan import Plan
from everstep.checkpoint.convert.source import read_box
from everstep.checkpoint.convert.spec import Rule, Spec
from everstep.checkpoint.kernels import copy_box
from everstep.checkpoint.layout import Box, TensorSpec
from everstep.checkpoint.pack import StridedBytes, dense_strides

Arrays = dict[str, NDArray[Any]]
DTYPES = {
    "C128": "<c16",
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "U8": "u1",
}


def dtype_name(array: NDArray[Any]) -> str:
    """The safetensors name of an array's dtype; uint16 stands for bfloat16."""
    return next(name for name, dtype in DTYPES.items() if array.dtype == np.dtype(dtype))


class ArraySource:
    """Arrays as the source of a conversion; remembers how many items were read of each."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.arrays = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
        for name, a in arrays.items():
            self.arrays[name].shape = a.shape  # 0-d arrays stay what they are
        self.tensors = {n: TensorSpec(n, dtype_name(a), a.shape) for n, a in self.arrays.items()}
        self.read_items = dict.fromkeys(self.arrays, 0)

    def fill(self, name: str, wanted: Box, target: StridedBytes) -> None:
        array, item_bytes = self.arrays[name], self.tensors[name].item_bytes
        strides = dense_strides(array.shape, item_bytes)
        self.read_items[name] += wanted.size
        copy_box(
            target.buffer,
            target.offset_bytes,
            target.strides_bytes,
            array.reshape(-1).view(np.uint8),
            sum(o * s for o, s in zip(wanted.offset, strides, strict=True)),
            strides,
            wanted.shape,
            item_bytes,
        )


def carried_out(plan: Plan, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
    """All tensors of a plan, read whole."""
    source = Converted(plan, ArraySource(arrays))
    return {
        name: read_box(source, name, spec.whole).view(DTYPES[spec.dtype]).reshape(spec.shape)
        for name, spec in source.tensors.items()
    }


def union_reference(
    spec: Spec, stored: Mapping[str, NDArray[Any]], shapes: Mapping[str, tuple[int, ...]]
) -> Arrays:
    """The logical tensors of stored ones, as the docstring of ``spec`` says it, in NumPy."""
    made: Arrays = {}
    for rule in spec.rules:
        groups: dict[tuple[tuple[str, str], ...], dict[int, NDArray[Any]]] = {}
        for name, array in stored.items():
            values = rule.stored.match(name)
            if values is not None:
                number = int(values.pop(rule.over)) if rule.over else 0
                groups.setdefault(tuple(values.items()), {})[number] = array
        for values, parts in groups.items():
            names = [template.render(dict(values)) for template in rule.logical]
            arrays = [parts[number] for number in sorted(parts)]
            wanted = [shapes[name] for name in names]
            made |= dict(zip(names, _union(rule, arrays, wanted), strict=True))
    return made


def _union(
    rule: Rule, parts: Sequence[NDArray[Any]], shapes: Sequence[tuple[int, ...]]
) -> list[NDArray[Any]]:
    if rule.flat is not None:
        row = np.concatenate([part.reshape(-1) for part in parts])
        sizes = [int(np.prod(shape)) for shape in shapes]
        ends = np.cumsum(sizes)
        return [
            row[end - size : end].reshape(shape)
            for size, end, shape in zip(sizes, ends, shapes, strict=True)
        ]
    whole = parts[0]
    if rule.sharded is not None:
        whole = np.concatenate(parts, axis=rule.sharded)
    if rule.average:
        whole = np.mean([part.astype("f8") for part in parts], axis=0).astype(parts[0].dtype)
    if rule.transposed is not None:
        whole = np.transpose(whole, None if rule.transposed is True else rule.transposed)
    if rule.fused is None:
        return [whole[tuple(slice(n) for n in shapes[0])]]
    sizes = [shape[rule.fused.dim] for shape in shapes]
    total = list(shapes[0])
    total[rule.fused.dim] = sum(sizes)
    whole = whole[tuple(slice(n) for n in total)]  # without padding
    return np.split(whole, np.cumsum(sizes)[:-1], axis=rule.fused.dim)
