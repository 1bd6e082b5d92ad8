"""Fragments and grids of boxes, as tests write them down."""

import math
from collections.abc import Iterable

from everstep.checkpoint.coverage import holdings
from everstep.checkpoint.layout import Box, Fragment, Grid, Layout, TensorSpec


def layout_of(fragments: Iterable[Fragment]) -> Layout:
    """The layout that fragments of one tensor form; raises LayoutError."""
    [(_, _, holding)] = holdings([fragments])
    return holding.layout


def grid_of(spec: TensorSpec, boxes: Iterable[Box]) -> Grid:
    """The grid that boxes form; anything else is an error."""
    layout = layout_of(Fragment(spec, box) for box in boxes)
    assert isinstance(layout, Grid)
    return layout


def flat_fragment(spec: TensorSpec, begin: int, end: int) -> Fragment:
    """The fragment of the items [begin, end) in C order: a box where that is all or one dim."""
    if (begin, end) == (0, math.prod(spec.shape)):
        return Fragment(spec, spec.whole)
    return Fragment(spec, Box((begin,), (end - begin,)), flat=len(spec.shape) != 1)
