"""Who writes what; what fills a box; what does not fit."""

import pytest

from everstep.checkpoint.errors import LayoutError
from everstep.checkpoint.layout import Box, Fragment, Grid, TensorSpec
from everstep.checkpoint.reshard import (
    CopyStep,
    held_nowhere,
    layout_differences,
    mark_held,
    plan_load,
    plan_save,
)


def _whole(name: str, items: int, dtype: str = "F32") -> Fragment:
    spec = TensorSpec(name, dtype, (items,))
    return Fragment(spec, spec.whole)


def test_replicas_are_written_once_and_shared_out() -> None:
    replicated = [_whole(f"p{i}", size) for i, size in enumerate([8, 8, 4, 4, 4, 4])]
    own = [_whole(f"rng{rank}", 2) for rank in range(4)]
    layouts = [[*replicated, own[rank]] for rank in range(4)]
    owned = plan_save(layouts)
    written = [f for fragments in owned for f in fragments]
    assert sorted(written) == sorted([*replicated, *own])
    assert [sum(f.size_bytes for f in fragments) // 4 for fragments in owned] == [10, 10, 10, 10]


def test_what_only_one_rank_holds_weighs_first() -> None:
    shared, big = _whole("shared", 4), _whole("big", 100)
    owned = plan_save([[shared, big], [shared]])
    assert owned == [[big], [shared]]


def test_the_order_of_fragments_does_not_matter() -> None:
    layout = [_whole(name, size) for name, size in zip("abcdef", [3, 3, 3, 1, 2, 5], strict=True)]
    assert plan_save([layout, layout]) == plan_save([layout[::-1], layout[2:] + layout[:2]])


def test_ranks_that_disagree_about_a_tensor() -> None:
    with pytest.raises(LayoutError, match=r"'w' is F32 \(4,\) on one rank and BF16 .* on rank 1"):
        plan_save([[_whole("w", 4)], [_whole("w", 4, "BF16")]])


def test_nothing_to_save() -> None:
    assert plan_save([[], []]) == [[], []]


def test_copies_come_from_every_cell_that_the_box_touches() -> None:
    grid = Grid(((0, 4, 8), (0, 6)))
    steps = plan_load(grid, (7, 9), (64, 8), 4, Box((3, 1), (2, 5)))
    assert steps == [
        CopyStep(7, 64, Box((0, 0), (4, 6)), Box((3, 1), (1, 5))),
        CopyStep(9, 8, Box((4, 0), (4, 6)), Box((4, 1), (1, 5))),
    ]


def test_an_empty_box_needs_no_copy() -> None:
    assert plan_load(Grid(((0, 4),)), (0,), (0,), 4, Box((4,), (0,))) == []
    assert plan_load(Grid(((0,),)), (), (), 4, Box((0,), (0,))) == []


def test_a_scalar_is_one_copy() -> None:
    scalar = Box((), ())
    assert plan_load(Grid(()), (3,), (16,), 4, scalar) == [CopyStep(3, 16, scalar, scalar)]


def test_differences_are_named() -> None:
    wanted = {"a": ("F32", (2,)), "b": ("F32", (2,)), "c": ("F32", ())}
    stored = {"b": ("F32", (3,)), "c": ("F32", ()), "d": ("F32", ())}
    assert layout_differences(wanted, stored) == [
        "tensor 'a' is not in the checkpoint",
        "the checkpoint's tensor 'd' is not in this run",
        "tensor 'b' is F32 [3] in the checkpoint and F32 [2] in this run",
    ]
    assert layout_differences(wanted, wanted) == []


def test_names_that_no_rank_holds() -> None:
    stored = ["d", "b", "a", "c"]
    marks = [mark_held({"a", "x"}, stored), mark_held({"a", "d"}, stored), mark_held(set(), stored)]
    assert held_nowhere(stored, marks) == {"b", "c"}
    assert held_nowhere(stored, [mark_held(stored, stored)]) == set()
    assert held_nowhere([], [mark_held({"a"}, [])]) == set()
