"""Boxes, fragments and grids."""

import itertools

import numpy as np
import pytest
import torch

from everstep.checkpoint.errors import LayoutError
from everstep.checkpoint.layout import (
    ITEM_BYTES,
    Box,
    Boxes,
    FlatRanges,
    Fragment,
    Grid,
    Layout,
    Piece,
    TensorSpec,
    flat_boxes,
)
from everstep.checkpoint.pack import STORED_AS
from everstep.checkpoint.torch_layout import DTYPES
from tests.support.fragments import flat_fragment, grid_of, layout_of


def test_intersection_is_that_of_the_items() -> None:
    for a, b in itertools.product(_boxes_within(3, 2), repeat=2):
        common = a.intersect(b)
        assert _items(common) == _items(a) & _items(b)
    assert Box((), ()).intersect(Box((), ())) == Box((), ())


def test_place_inside_another_box() -> None:
    assert Box((5, 2), (1, 1)).relative_to(Box((3, 2), (4, 4))) == (2, 0)


def test_item_sizes_are_those_of_torch() -> None:
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == ITEM_BYTES


@pytest.mark.parametrize(
    ("shape", "box", "key", "size_bytes"),
    [
        ((4, 6), Box((0, 0), (4, 6)), "w", 96),
        ((4, 6), Box((2, 0), (2, 3)), "w[2:4,0:3]", 24),
        ((), Box((), ()), "w", 4),
        ((0, 3), Box((0, 0), (0, 3)), "w", 0),
    ],
)
def test_names_and_sizes_of_fragments(
    shape: tuple[int, ...], box: Box, key: str, size_bytes: int
) -> None:
    fragment = Fragment(TensorSpec("w", "F32", shape), box)
    assert (fragment.key, fragment.size_bytes) == (key, size_bytes)


def test_cells_tile_the_tensor_in_c_order() -> None:
    grid = Grid(((0, 3, 5, 8), (0, 4, 6)))
    seen = np.zeros((8, 6), dtype=int)
    for number, cell in enumerate(grid.cells()):
        seen[_slices(cell)] += 1
        assert cell == grid.cell(divmod(number, 2))
    assert (seen == 1).all()
    assert list(grid.cell_sizes()) == [cell.size for cell in grid.cells()]


@pytest.mark.parametrize("bounds", [(), ((0,),), ((0,), (0, 3))])
def test_cells_of_scalars_and_of_empty_tensors(bounds: tuple[tuple[int, ...], ...]) -> None:
    grid = Grid(bounds)
    assert grid.n_cells == (0 if bounds else 1) == len(list(grid.cells()))
    assert list(grid.cell_sizes()) == [cell.size for cell in grid.cells()]


def test_overlapping_cells_are_those_that_share_items() -> None:
    grid = Grid(((0, 1, 4, 5), (0, 3, 5)))
    for box in _boxes_within(5, 2):
        wanted = [
            Piece(number, cell, 0, common)
            for number, cell in enumerate(grid.cells())
            if (common := cell.intersect(box)) is not None
        ]
        assert list(grid.overlapping(box)) == wanted


def test_grid_of_shuffled_and_empty_boxes() -> None:
    spec = TensorSpec("w", "F32", (5, 4))
    grid = Grid(((0, 2, 5), (0, 1, 4)))
    assert grid_of(spec, [*reversed(list(grid.cells())), Box((5, 0), (0, 4))]) == grid


def test_grid_of_a_scalar_and_of_an_empty_tensor() -> None:
    assert grid_of(TensorSpec("s", "F32", ()), [Box((), ())]) == Grid(())
    empty = TensorSpec("e", "F32", (3, 0))
    assert grid_of(empty, [empty.whole]) == Grid(((0, 3), (0,)))


@pytest.mark.parametrize(
    ("shape", "begin", "end", "boxes"),
    [
        ((), 0, 1, [Box((), ())]),
        ((7,), 2, 5, [Box((2,), (3,))]),
        ((3, 4), 0, 12, [Box((0, 0), (3, 4))]),
        ((3, 4), 5, 7, [Box((1, 1), (1, 2))]),
        ((3, 4), 3, 9, [Box((0, 3), (1, 1)), Box((1, 0), (1, 4)), Box((2, 0), (1, 1))]),
        ((3, 4), 4, 4, []),
        ((3, 0), 0, 0, []),
    ],
)
def test_boxes_of_a_flat_range(
    shape: tuple[int, ...], begin: int, end: int, boxes: list[Box]
) -> None:
    assert list(flat_boxes(shape, begin, end)) == boxes


def test_every_flat_range_is_few_dense_boxes() -> None:
    shape = (3, 2, 4)
    numbers = np.arange(24).reshape(shape)
    for begin, end in itertools.combinations(range(25), 2):
        boxes = list(flat_boxes(shape, begin, end))
        assert len(boxes) <= 2 * len(shape) - 1
        items = [numbers[_slices(box)].reshape(-1) for box in boxes]
        assert np.concatenate(items).tolist() == list(range(begin, end))


def test_a_flat_range_is_a_box_where_it_can_be() -> None:
    matrix, vector = TensorSpec("m", "F32", (3, 4)), TensorSpec("v", "F32", (9,))
    assert flat_fragment(matrix, 0, 12) == Fragment(matrix, matrix.whole)
    assert flat_fragment(vector, 2, 5) == Fragment(vector, Box((2,), (3,)))
    assert flat_fragment(matrix, 2, 5) == Fragment(matrix, Box((2,), (3,)), True)
    assert flat_fragment(matrix, 2, 5).key == "m[flat 2:5]"
    assert flat_fragment(matrix, 2, 5).size_bytes == 12


UNEVEN = (
    Box((0, 0), (2, 3)), Box((0, 3), (1, 2)), Box((1, 3), (3, 2)),
    Box((2, 0), (2, 1)), Box((2, 1), (2, 2)),
)  # fmt: skip
LAYOUTS: list[Layout] = [
    Boxes(UNEVEN),
    FlatRanges((4, 5), (0, 1, 7, 9, 20)),
    Grid(((0, 1, 4), (0, 2, 5))),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: type(layout).__name__)
def test_what_to_copy_out_of_any_layout(layout: Layout) -> None:
    whole = np.arange(20).reshape(4, 5)
    cells = [
        whole.reshape(-1)[_slices(cell)] if layout.flat else whole[_slices(cell)]
        for cell in layout.cells()
    ]
    assert layout.n_cells == len(cells)
    assert layout.cell_sizes().tolist() == [cell.size for cell in layout.cells()]
    for wanted in (
        Box((r, c), (h, w))
        for r in range(4)
        for c in range(5)
        for h in range(1, 5 - r)
        for w in range(1, 6 - c)
    ):
        target = np.full(wanted.shape, -1)
        for number, dense, first_item, box in layout.overlapping(wanted):
            items = cells[number].reshape(-1)[first_item:][: dense.size].reshape(dense.shape)
            inside = Box(box.relative_to(wanted), box.shape)
            assert (target[_slices(inside)] == -1).all()
            target[_slices(inside)] = items[_slices(Box(box.relative_to(dense), box.shape))]
        assert (target == whole[_slices(wanted)]).all()


@pytest.mark.parametrize(
    "boxes",
    [
        [Box((0, 0), (2, 4))],
        [Box((2, 0), (3, 4))],
        [Box((0, 0), (2, 4)), Box((3, 0), (2, 4))],
        [Box((0, 0), (3, 4)), Box((2, 0), (3, 4))],
        [Box((0, 0), (2, 4)), Box((2, 0), (3, 4)), Box((0, 0), (5, 4))],
        [Box((0, 0), (2, 4)), Box((2, 0), (4, 4))],
    ],
    ids=["end", "begin", "hole", "overlap", "twice", "beyond"],
)
def test_boxes_that_are_no_layout(boxes: list[Box]) -> None:
    spec = TensorSpec("w", "F32", (5, 4))
    with pytest.raises(LayoutError, match="'w'"):
        layout_of([Fragment(spec, box) for box in boxes])


def test_dtypes_are_those_of_safetensors_where_it_has_them() -> None:
    from safetensors.torch import save

    for name, dtype in DTYPES.items():
        if name not in STORED_AS:
            assert f'"{name}"'.encode() in save({"x": torch.zeros(1, dtype=dtype)})


def _boxes_within(n: int, dims: int) -> list[Box]:
    spans = [(o, e - o) for o in range(n) for e in range(o + 1, n + 1)]
    return [
        Box(tuple(o for o, _ in pick), tuple(m for _, m in pick))
        for pick in itertools.product(spans, repeat=dims)
    ]


def _items(box: Box | None) -> set[tuple[int, ...]]:
    if box is None:
        return set()
    return set(
        itertools.product(*(range(o, o + n) for o, n in zip(box.offset, box.shape, strict=True)))
    )


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
