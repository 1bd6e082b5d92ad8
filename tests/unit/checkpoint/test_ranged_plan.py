"""Which ranges are fetched: everything that is needed once, in few requests, cut to fit."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.checkpoint.layout import Box
from everstep.checkpoint.ranged_plan import (
    GAP_BLOCKS,
    WINDOW_BLOCKS,
    Window,
    needed_blocks,
    pieces_of,
    plan_windows,
    split_box,
)

SHAPES = st.lists(st.integers(1, 6), min_size=0, max_size=4)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[Box, Box]:
    """A cell and a box inside of it."""
    offset, shape, inner_offset, inner_shape = [], [], [], []
    for n in draw(SHAPES):
        begin = draw(st.integers(0, 5))
        first = draw(st.integers(0, n - 1))
        offset.append(begin)
        shape.append(n)
        inner_offset.append(begin + first)
        inner_shape.append(draw(st.integers(1, n - first)))
    return (
        Box(tuple(offset), tuple(shape)),
        Box(tuple(inner_offset), tuple(inner_shape)),
    )


def _bytes_of(cell: Box, box: Box, item_bytes: int) -> np.ndarray:
    """Byte offsets of the first byte of every item of a box of a dense cell, the slow way."""
    numbers = np.arange(cell.size).reshape(cell.shape)
    inside = box.relative_to(cell)
    return numbers[tuple(slice(o, o + n) for o, n in zip(inside, box.shape, strict=True))] * (
        item_bytes
    )


@settings(max_examples=300, deadline=None)
@given(boxes(), st.sampled_from([1, 2, 4]), st.integers(1, 200))
def test_pieces_make_the_box_and_are_small(
    pair: tuple[Box, Box], item_bytes: int, limit_bytes: int
) -> None:
    cell, box = pair
    seen: list[int] = []
    for part in split_box(cell, box, item_bytes, limit_bytes):
        at = _bytes_of(cell, part, item_bytes)
        seen += at.ravel().tolist()
        assert at.size == 1 or at.max() + item_bytes - at.min() <= limit_bytes
    assert sorted(seen) == _bytes_of(cell, box, item_bytes).ravel().tolist()


def test_a_piece_says_where_its_bytes_are() -> None:
    cell = Box((2, 0), (4, 10))
    pieces = pieces_of(7, 1000, cell, Box((3, 2), (2, 5)), 4, 20)
    assert [(p.begin, p.end) for p in pieces] == [(1048, 1068), (1088, 1108)]
    assert {p.request for p in pieces} == {7}


def test_blocks_are_those_that_pieces_touch() -> None:
    cell = Box((0,), (100,))
    pieces = pieces_of(0, 0, cell, Box((15,), (10,)), 1, 100)
    assert needed_blocks(pieces, 95, 10).tolist() == [False, True, True] + [False] * 7


@given(st.lists(st.booleans(), max_size=80))
def test_windows_hold_every_needed_block_once(needed: list[bool]) -> None:
    windows = plan_windows(3, np.array(needed, np.bool_))
    covered = [block for w in windows for block in range(w.begin, w.end)]
    assert len(set(covered)) == len(covered)
    assert {i for i, n in enumerate(needed) if n} <= set(covered)
    assert windows == sorted(windows)
    assert all(0 < w.end - w.begin <= WINDOW_BLOCKS and w.pack == 3 for w in windows)
    for a, b in pairwise(windows):
        assert b.begin == a.end or b.begin - a.end > GAP_BLOCKS
    for window in windows:  # nothing is fetched at the ends that nobody needs
        assert (
            window == windows[-1]
            or window.end in [w.begin for w in windows]
            or (needed[window.end - 1])
        )


@pytest.mark.parametrize(
    ("needed", "expected"),
    [
        ("", []),
        ("1", [(0, 1)]),
        ("1001", [(0, 4)]),
        ("10001", [(0, 1), (4, 5)]),
        ("111111", [(0, 4), (4, 6)]),
    ],
)
def test_close_ranges_are_merged(needed: str, expected: list[tuple[int, int]]) -> None:
    blocks = np.array([c == "1" for c in needed], np.bool_)
    assert plan_windows(0, blocks) == [Window(0, *pair) for pair in expected]
