"""Fragments cover a tensor exactly once, or it is said where they do not."""

import time

import pytest

from everstep.checkpoint.coverage import check_boxes, holdings
from everstep.checkpoint.errors import LayoutError
from everstep.checkpoint.layout import (
    Box,
    Boxes,
    FlatRanges,
    Fragment,
    Grid,
    TensorSpec,
)
from tests.support.fragments import flat_fragment, layout_of

SPEC = TensorSpec("w", "F32", (4, 5))
HALVES = [Box((0, 0), (2, 5)), Box((2, 0), (2, 5))]
UNEVEN = [Box((0, 0), (2, 5)), Box((2, 0), (2, 2)), Box((2, 2), (2, 3))]


def _fragments(boxes: list[Box]) -> list[Fragment]:
    return [Fragment(SPEC, box) for box in boxes]


def test_the_simplest_form_is_chosen() -> None:
    assert layout_of(_fragments(HALVES)) == Grid(((0, 2, 4), (0, 5)))
    assert layout_of(_fragments(UNEVEN[::-1])) == Boxes(tuple(UNEVEN))
    flat = [flat_fragment(SPEC, 7, 20), flat_fragment(SPEC, 0, 7), flat_fragment(SPEC, 7, 20)]
    assert layout_of(flat) == FlatRanges((4, 5), (0, 7, 20))
    empty = TensorSpec("e", "F32", (0, 5))
    assert layout_of([Fragment(empty, empty.whole)]) == Grid(((0,), (0, 5)))


@pytest.mark.parametrize(
    ("boxes", "says"),
    [
        ([Box((4, 0), (0, 5))], "nothing of it is held"),
        (UNEVEN[:2], r"item \[2, 2\] is held by 0 of its boxes"),
        (UNEVEN[1:], r"item \[0, 0\] is held by 0 of its boxes"),
        ([*UNEVEN, Box((3, 4), (1, 1))], r"item \[3, 4\] is held by 2 of its boxes"),
        ([*UNEVEN, SPEC.whole], r"item \[0, 0\] is held by 2 of its boxes"),
        ([*UNEVEN[:2], Box((2, 1), (2, 4))], r"item \[2, 1\] is held by 2 of its boxes"),
        ([*UNEVEN[:2], Box((2, 2), (3, 3))], "a box leaves the tensor"),
    ],
)
def test_boxes_with_holes_and_overlaps(boxes: list[Box], says: str) -> None:
    with pytest.raises(LayoutError, match=rf"tensor 'w' of shape \(4, 5\): .*{says}"):
        layout_of(_fragments(boxes))


@pytest.mark.parametrize(
    ("ranges", "says"),
    [
        ([(0, 7), (8, 20)], "item 7 of the flattened tensor is held 0 times"),
        ([(0, 7), (6, 20)], "item 6 of the flattened tensor is held 2 times"),
        ([(1, 20)], "item 0 of the flattened tensor is held 0 times"),
        ([(0, 19)], "end at item 19 of 20"),
    ],
)
def test_flat_ranges_with_holes_and_overlaps(ranges: list[tuple[int, int]], says: str) -> None:
    with pytest.raises(LayoutError, match=f"'w'.*{says}"):
        layout_of([flat_fragment(SPEC, *r) for r in ranges])


def test_boxes_and_flat_ranges_of_one_tensor_are_refused() -> None:
    with pytest.raises(LayoutError, match="as boxes by some ranks and as flat ranges by others"):
        layout_of([flat_fragment(SPEC, 0, 10), Fragment(SPEC, HALVES[1])])


def test_one_tensor_cut_differently_by_two_meshes_is_refused() -> None:
    columns = [Box((0, 0), (4, 3)), Box((0, 3), (4, 2))]
    with pytest.raises(LayoutError, match=r"'w'.* is held by 2 of its boxes"):
        list(holdings([_fragments([box]) for box in (*HALVES, *columns)]))


def test_boxes_in_more_dims_than_can_be_checked_are_refused_at_once() -> None:
    dims = 30
    shape = (2,) * dims
    boxes = [Box((0,) * dims, (1,) * dims), Box((1,) * dims, (1,) * dims)]
    begun_s = time.process_time()
    with pytest.raises(ValueError, match="cut 30 dims"):
        check_boxes(shape, boxes)
    assert time.process_time() - begun_s < 2


def test_many_boxes_are_checked_in_little_time() -> None:
    """Two different grids in the halves of a tensor, 60,000 boxes: comparing pairs takes hours."""
    left = [Box((3 * r, c), (3, 1)) for r in range(100) for c in range(300)]
    right = [Box((r, 300 + 3 * c), (1, 3)) for r in range(300) for c in range(100)]
    begun_s = time.process_time()
    check_boxes((300, 600), left + right)
    with pytest.raises(ValueError, match=r"item \[299, 597\] is held by 0"):
        check_boxes((300, 600), left + right[:-1])
    assert time.process_time() - begun_s < 5
