"""Copies in bytes agree with the plan in boxes, which is simple."""

from everstep.checkpoint.copy_plan import BoxCopy, plan_copies
from everstep.checkpoint.layout import Box, Boxes, FlatRanges, Grid, Layout
from everstep.checkpoint.pack import dense_strides
from everstep.checkpoint.reshard import plan_load

WANTED = Box((3, 1), (2, 5))
STRIDES = (100, 8)
"""Of an array with gaps between rows and between items."""


def _by_hand(layout: Layout, packs: tuple[int, ...], starts: tuple[int, ...]) -> list[BoxCopy]:
    found = []
    for pack, start, cell, box in plan_load(layout, packs, starts, 4, WANTED):
        strides = dense_strides(cell.shape, 4)
        row, column = box.relative_to(cell)
        begin = start + row * strides[0] + column * strides[1]
        last = begin + (box.shape[0] - 1) * strides[0] + (box.shape[1] - 1) * strides[1]
        to_row, to_column = box.relative_to(WANTED)
        target = to_row * STRIDES[0] + to_column * STRIDES[1]
        found.append(BoxCopy(pack, begin, last + 4, strides, target, box.shape))
    return found


def test_every_form_of_layout() -> None:
    boxes = Boxes((Box((0, 0), (4, 6)), Box((4, 0), (4, 3)), Box((4, 3), (4, 3))))
    layouts = [
        (Grid(((0, 4, 8), (0, 6))), (7, 9), (64, 8)),
        (boxes, (1, 0, 1), (0, 4, 96)),
        (FlatRanges((8, 6), (0, 21, 26, 48)), (2, 0, 1), (12, 40, 0)),
    ]
    for layout, packs, starts in layouts:
        copies = plan_copies(layout, packs, starts, 4, WANTED, STRIDES)
        assert copies == _by_hand(layout, packs, starts)
        assert sum(c.shape[0] * c.shape[1] for c in copies) == WANTED.size


def test_the_same_cut_elsewhere() -> None:
    grid = Grid(((0, 4, 8), (0, 6)))
    here = plan_copies(grid, (7, 9), (64, 8), 4, WANTED, STRIDES)
    there = plan_copies(grid, (9, 7), (164, 1008), 4, WANTED, STRIDES)
    assert [c.begin for c in there] == [here[0].begin + 100, here[1].begin + 1000]
    assert [c.pack for c in there] == [9, 7]


def test_a_scalar_and_nothing() -> None:
    assert plan_copies(Grid(()), (3,), (16,), 4, Box((), ()), ()) == [BoxCopy(3, 16, 20, (), 0, ())]
    assert plan_copies(Grid(((0, 4),)), (0,), (0,), 4, Box((4,), (0,)), (4,)) == []
