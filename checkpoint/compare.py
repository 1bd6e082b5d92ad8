"""What is different between two checkpoints, whatever their layouts are: names, shapes, values."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.layout import TensorSpec
from everstep.checkpoint.numbers import numbers, words
from everstep.checkpoint.pieces import PIECE_BYTES, pieces
from everstep.checkpoint.step_reader import StepReader

_CHUNK_ITEMS = 2**18  # of what is compared at a time: some float64 arrays of 2 MiB
_ABSENT = object()


@dataclass(frozen=True)
class Differences:
    """Between the elements of two tensors, or of parts of them."""

    elements: int = 0
    """How many differ."""
    nans: int = 0
    """Of these, how many have a NaN on a side."""
    largest: float | int = 0
    """Largest absolute difference of the others: exact for integers, else that of float64."""

    def __add__(self, other: "Differences") -> "Differences":
        return Differences(
            self.elements + other.elements,
            self.nans + other.nans,
            max(self.largest, other.largest),
        )


@dataclass(frozen=True, kw_only=True)
class TensorComparison:
    """Two tensors of one name."""

    first: TensorSpec
    second: TensorSpec
    differences: Differences | None
    """None where the shapes differ, and elements cannot be compared."""

    @property
    def equal(self) -> bool:
        """Whether shapes, dtypes and values are the same."""
        return self.first == self.second and self.differences == Differences()


@dataclass(frozen=True)
class ObjectDifference:
    """A value of the JSON-able state that is another, or absent, on the other side."""

    path: str
    first: str | None
    """As JSON; None: absent."""
    second: str | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two checkpoints."""

    only_first: tuple[str, ...]
    """Names of tensors that the second does not have."""
    only_second: tuple[str, ...]
    tensors: tuple[TensorComparison, ...]
    """Those that both have, equal or not."""
    objects: tuple[ObjectDifference, ...]

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        names = self.only_first or self.only_second or self.objects
        return not names and all(t.equal for t in self.tensors)


def compare_steps(
    first: StepReader,
    second: StepReader,
    *,
    names: Collection[str],
    atol: float | None = None,
    objects: bool = True,
    on_bytes: Callable[[int], None] | None = None,
) -> Comparison:
    """Compare tensors of two checkpoints, piece by piece, in less than 32 MiB of memory.

    Args:
        first: reader of one.
        second: reader of the other.
        names: the tensors to compare; those that a side lacks are reported.
        atol: None: elements are equal if their bits are. Else also if their numbers differ by at
            most this much, or if both are NaN.
        objects: whether to compare the JSON-able state, too.
        on_bytes: called with the number of bytes of the first that are compared so far.

    Raises:
        DamagedError: a pack is not what its manifest says.
        OSError: as the file system reports it.
    """
    mine, other = first.manifest.tensors, second.manifest.tensors
    chosen = sorted(names)
    done_bytes = 0
    compared = []
    for name in chosen:
        if name in mine and name in other:

            def report(count: int, before: int = done_bytes) -> None:
                if on_bytes is not None:
                    on_bytes(before + count)

            compared.append(_compare_tensor(first, second, name, atol, report))
            done_bytes += mine[name].spec.size_bytes
    return Comparison(
        only_first=tuple(n for n in chosen if n in mine and n not in other),
        only_second=tuple(n for n in chosen if n in other and n not in mine),
        tensors=tuple(compared),
        objects=tuple(
            object_differences(first.manifest.objects, second.manifest.objects) if objects else ()
        ),
    )


def object_differences(first: Any, second: Any, path: str = "") -> Iterator[ObjectDifference]:
    """Where two values of JSON differ: the smallest parts that do."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for key in sorted({*first, *second}):
            a, b = first.get(key, _ABSENT), second.get(key, _ABSENT)
            yield from object_differences(a, b, f"{path}.{key}" if path else key)
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            yield from object_differences(a, b, f"{path}[{index}]")
    elif type(first) is not type(second) or first != second:
        yield ObjectDifference(path, _text(first), _text(second))


def differences(
    first: TensorSpec, a: ByteArray, second: TensorSpec, b: ByteArray, atol: float | None = None
) -> Differences:
    """Compare dense runs of the same number of elements of two tensors.

    Args:
        first: the tensor of ``a``.
        a: its bytes.
        second: the tensor of ``b``; of another dtype, its numbers are compared, not its bits.
        b: its bytes.
        atol: as in ``compare_steps``.
    """
    same_dtype = first.dtype == second.dtype
    if same_dtype:
        if np.array_equal(a, b):
            return Differences()
        differs = (words(a, first.item_bytes) != words(b, second.item_bytes)).any(axis=1)
    else:
        differs = np.ones(len(a) // first.item_bytes, bool)
    x, y = numbers(first.dtype, a)[differs], numbers(second.dtype, b)[differs]
    distance = _distance(x, y)
    if atol is not None or not same_dtype:
        same = (x == y) | (np.isnan(x) & np.isnan(y)) | (distance <= (atol or 0))
        distance = distance[~same]
    known = distance[~np.isnan(distance)]
    return Differences(len(distance), len(distance) - len(known), known.max(initial=0).item())


def _compare_tensor(
    first: StepReader,
    second: StepReader,
    name: str,
    atol: float | None,
    on_bytes: Callable[[int], None],
) -> TensorComparison:
    a, b = first.manifest.tensors[name].spec, second.manifest.tensors[name].spec
    if a.shape != b.shape:
        return TensorComparison(first=a, second=b, differences=None)
    found, done_bytes = Differences(), 0
    for piece in pieces(a.whole, PIECE_BYTES // max(a.item_bytes, b.item_bytes)):
        data_a, data_b = first.read(name, piece), second.read(name, piece)
        for at in range(0, piece.size, _CHUNK_ITEMS):
            part_a = data_a[at * a.item_bytes : (at + _CHUNK_ITEMS) * a.item_bytes]
            part_b = data_b[at * b.item_bytes : (at + _CHUNK_ITEMS) * b.item_bytes]
            found += differences(a, part_a, b, part_b, atol)
        done_bytes += len(data_a)
        on_bytes(done_bytes)
    return TensorComparison(first=a, second=b, differences=found)


def _distance(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """|x - y| per element: exact for two integer arrays of one dtype, else in float64."""
    if x.dtype == y.dtype and x.dtype.kind in "iu":
        unsigned = f"u{x.dtype.itemsize}"
        exact: npt.NDArray[Any] = np.maximum(x, y).view(unsigned) - np.minimum(x, y).view(unsigned)
        return exact
    wide = np.complex128 if "c" in (x.dtype.kind, y.dtype.kind) else np.float64
    with np.errstate(invalid="ignore", over="ignore"):  # inf - inf, NaN
        return np.abs(x.astype(wide) - y.astype(wide))


def _text(value: Any) -> str | None:
    return None if value is _ABSENT else json.dumps(value)
