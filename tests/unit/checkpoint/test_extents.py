"""Blocks of extents: where they lie, and which extents are refused."""

import pytest

from everstep.checkpoint.extents import Extents, Span, check_extents


def test_blocks_begin_anew_in_each_extent() -> None:
    extents = Extents([(100, 25), (7, 10), (200, 1)], 10)
    assert (extents.n_blocks, extents.starts, extents.end) == (5, [0, 30, 40], 41)
    assert list(extents.spans(0, 5)) == [Span(0, 100, 25), Span(3, 7, 10), Span(4, 200, 1)]
    assert list(extents.spans(1, 2)) == [Span(1, 110, 10)]
    assert list(extents.spans(2, 4)) == [Span(2, 120, 5), Span(3, 7, 10)]
    assert [extents.file_offset(a) for a in (0, 24, 30, 39, 40)] == [100, 124, 7, 16, 200]


def test_no_extents() -> None:
    extents = Extents([], 10)
    assert (extents.n_blocks, extents.starts, extents.end) == (0, [], 0)
    assert list(extents.spans(0, 0)) == []
    check_extents([], [], 0)


def test_extents_side_by_side_to_the_end_of_the_file() -> None:
    check_extents([(8, 8), (0, 8), (16, 3)], [4, 8, 1], 19)


@pytest.mark.parametrize(
    ("extents", "items", "problem"),
    [
        ([(0, 8), (7, 4)], [1, 1], "the extent of 8 bytes at byte 0 overlaps the next one"),
        ([(4, 4), (4, 4)], [4, 4], "overlaps"),
        ([(2, 4)], [4], "the extent of 4 bytes at byte 2 is not aligned to its items"),
        ([(0, 4), (12, 9)], [4, 1], "9 bytes at byte 12 leaves its file of 20 bytes"),
    ],
)
def test_what_is_refused(extents: list[tuple[int, int]], items: list[int], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        check_extents(extents, items, 20)
