"""Boxes are cut into pieces that are contiguous runs of them, in order."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.checkpoint.layout import Box
from everstep.checkpoint.pieces import linear_indices, pieces


@st.composite
def boxes_in_shapes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    """A shape, and a box in it that may be empty."""
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=4)))
    offset = tuple(draw(st.integers(0, n)) for n in shape)
    size = tuple(draw(st.integers(0, n - o)) for n, o in zip(shape, offset, strict=True))
    return shape, Box(offset, size)


@settings(deadline=None)
@given(boxes_in_shapes(), st.integers(1, 60))
def test_pieces_are_the_box_in_order(case: tuple[tuple[int, ...], Box], max_items: int) -> None:
    shape, box = case
    tensor = np.arange(int(np.prod(shape, dtype=int)), dtype=np.uint64).reshape(shape)
    index = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
    expected = tensor[index].reshape(-1)
    np.testing.assert_array_equal(linear_indices(shape, box), expected)
    found = list(pieces(box, max_items))
    assert all(0 < piece.size <= max_items for piece in found)
    joined = [i for piece in found for i in linear_indices(shape, piece).tolist()]
    assert joined == expected.tolist()


def test_pieces_are_not_smaller_than_needed() -> None:
    assert list(pieces(Box((2, 0, 0), (4, 3, 5)), 30)) == [
        Box((2, 0, 0), (2, 3, 5)),
        Box((4, 0, 0), (2, 3, 5)),
    ]
    assert list(pieces(Box((), ()), 1)) == [Box((), ())]
    assert list(pieces(Box((0, 0), (0, 3)), 1)) == []
