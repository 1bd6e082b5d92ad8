"""Grids and runs as compact JSON."""

from typing import Any

import pytest

from everstep.checkpoint.grid_codec import decode_bounds, decode_runs, encode_bounds, encode_runs


@pytest.mark.parametrize(
    ("bounds", "coded"),
    [
        ((), []),
        (((0, 4, 8, 12),), [4]),
        (((0, 4, 8, 10),), [4]),
        (((0, 10),), [10]),
        (((0, 3, 5, 8, 10),), [[3, 5, 8]]),
        (((0, 2, 5),), [[2]]),
        (((0,), (0, 3)), [1, 3]),
        (((0, 1),), [1]),
    ],
)
def test_bounds_there_and_back(bounds: tuple[tuple[int, ...], ...], coded: list[Any]) -> None:
    assert encode_bounds(bounds) == coded
    cells = max([1, *(len(b) - 1 for b in bounds)])
    assert decode_bounds(coded, [b[-1] for b in bounds], cells) == bounds


@pytest.mark.parametrize(
    "coded",
    [
        None,
        4,
        [],
        [4, 4],
        [0],
        [-1],
        [True],
        [4.0],
        ["4"],
        [None],
        [[4, 4]],
        [[0]],
        [[10]],
        [[5, 3]],
        [["4"]],
        [[True]],
        [[4, 12]],
        [{}],
    ],
    ids=str,
)
def test_what_is_no_grid_of_ten(coded: object) -> None:
    with pytest.raises(ValueError):
        decode_bounds(coded, (10,), 100)


@pytest.mark.parametrize(
    ("coded", "shape"),
    [
        ([1], (2**59,)),
        ([1, 1], (2**20, 2**20)),
        ([1, [1]], (2, 2)),
        ([1, 1], (0, 2**50)),
        ([1, 1], (2**50, 0)),
        ([[1, 2, 3]], (4,)),
    ],
)
def test_more_cells_than_allowed_are_refused_before_they_are_made(
    coded: list[Any], shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="at most"):
        decode_bounds(coded, shape, 3)


def test_as_many_cells_as_allowed() -> None:
    assert decode_bounds([1, [2]], (3, 5), 6) == ((0, 1, 2, 3), (0, 2, 5))


@pytest.mark.parametrize(
    ("values", "runs"),
    [
        ([], []),
        ([5], [[5, 1, 0]]),
        ([3, 3, 3], [[3, 3, 0]]),
        ([0, 2, 4, 6], [[0, 4, 2]]),
        ([3, 2, 1, 7, 7], [[3, 3, -1], [7, 2, 0]]),
        ([0, 1, 3], [[0, 2, 1], [3, 1, 0]]),
    ],
)
def test_runs_there_and_back(values: list[int], runs: list[list[int]]) -> None:
    assert encode_runs(values) == runs
    assert decode_runs(runs, len(values), 8) == values


@pytest.mark.parametrize(
    "coded",
    [
        None,
        {},
        [[0, 1]],
        [[0, 2, 1, 0]],
        ["abc"],
        [[0, True, 0]],
        [[0.0, 1, 0]],
        [[0, 0, 0]],
        [[0, -1, 0]],
        [[0, 1, 0]],
        [[0, 3, 0]],
        [[0, 2**62, 0]],
        [[0, 2, -1]],
        [[7, 2, 1]],
        [0],
    ],
    ids=str,
)
def test_what_is_no_sequence_of_two_below_eight(coded: object) -> None:
    with pytest.raises(ValueError):
        decode_runs(coded, 2, 8)
