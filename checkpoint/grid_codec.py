"""Compact JSON forms of grids and of the pack of each cell, so that manifests stay small (pure)."""

import reprlib
from collections.abc import Sequence
from itertools import pairwise

GridJson = list[int | list[int]]
RunsJson = list[list[int]]


def encode_bounds(bounds: Sequence[Sequence[int]]) -> GridJson:
    """Per dim the chunk size where all chunks but the last are equal, else all inner boundaries."""
    out: GridJson = []
    for b in bounds:
        widths = [hi - lo for lo, hi in pairwise(b)]
        regular = all(w == widths[0] for w in widths[:-1]) and widths[-1:] <= widths[:1]
        out.append((widths[0] if widths else 1) if regular else list(b[1:-1]))
    return out


def decode_bounds(
    coded: object, shape: Sequence[int], max_cells: int
) -> tuple[tuple[int, ...], ...]:
    """Inverse of ``encode_bounds``; takes no more memory than ``max_cells`` cells need.

    Raises:
        ValueError: not a grid over this shape, or one of more cells.
    """
    if not isinstance(coded, list) or len(coded) != len(shape):
        raise ValueError("the grid does not have one entry per dim")
    out = []
    for entry, n in zip(coded, shape, strict=True):
        if type(entry) is int and entry >= 1:
            count = -(-n // entry)
        elif isinstance(entry, list) and all(type(b) is int for b in entry):
            count = len(entry) + 1
        else:
            raise ValueError(f"grid entry {reprlib.repr(entry)}")
        if count > max_cells:
            raise ValueError(f"{count} chunks along one dim, expected at most {max_cells}")
        max_cells //= max(1, count)
        bounds = (0, *entry, n) if isinstance(entry, list) else (*range(0, n, entry), n)
        if any(lo >= hi for lo, hi in pairwise(bounds)):
            raise ValueError(f"boundaries {reprlib.repr(entry)} do not ascend within extent {n}")
        out.append(bounds)
    return tuple(out)


def encode_runs(values: Sequence[int]) -> RunsJson:
    """Runs ``[first, count, step]`` of an integer sequence, greedily."""
    runs: RunsJson = []
    for value in values:
        if runs:
            first, count, step = runs[-1]
            if count == 1:
                runs[-1] = [first, 2, value - first]
                continue
            if value == first + count * step:
                runs[-1][1] += 1
                continue
        runs.append([value, 1, 0])
    return runs


def decode_runs(coded: object, count: int, limit: int) -> list[int]:
    """Inverse of ``encode_runs``: ``count`` values, each in [0, limit).

    Raises:
        ValueError: not such a sequence.
    """
    if not isinstance(coded, list):
        raise ValueError("the runs are not a list")
    values: list[int] = []
    for run in coded:
        if not (isinstance(run, list) and len(run) == 3 and all(type(x) is int for x in run)):
            raise ValueError(f"run {reprlib.repr(run)}")
        first, n, step = run
        if n < 1 or len(values) + n > count:
            raise ValueError(f"run {reprlib.repr(run)} makes more than {count} values")
        values.extend(first + i * step for i in range(n))
    if len(values) != count:
        raise ValueError(f"{len(values)} values, expected {count}")
    if any(not 0 <= v < limit for v in values):
        raise ValueError(f"a value is outside [0, {limit})")
    return values
