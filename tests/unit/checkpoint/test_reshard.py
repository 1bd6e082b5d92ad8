"""Who writes what; what fills a box; what does not fit."""

import pytest

from everstep.checkpoint.errors import LayoutError
from everstep.checkpoint.layout import Box, Fragment, Grid, TensorSpec
from everstep.checkpoint.reshard import (
    CopyStep,
    byte_ranges,
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


def test_nodes_are_balanced_before_ranks() -> None:
    """Rank 0 shares its node with three others that have much to write of their own."""
    shared = [_whole(f"s{i}", 4) for i in range(12)]
    own = [_whole(f"own{rank}", 8) if rank in (1, 2, 3) else None for rank in range(8)]
    layouts = [[*shared, *([mine] if mine else [])] for mine in own]
    owned = plan_save(layouts, nodes=[0, 0, 0, 0, 1, 1, 1, 1])
    load = [sum(f.size_bytes for f in fragments) // 4 for fragments in owned]
    assert sum(load[:4]) == sum(load[4:]) == 36
    assert max(load[4:]) - min(load[4:]) <= 4


def test_a_node_with_one_rank_gets_no_more_than_that_rank_can_write() -> None:
    shared = [_whole(f"s{i}", 1) for i in range(50)]
    owned = plan_save([shared] * 5, nodes=[7, 7, 7, 7, 3])
    assert [len(fragments) for fragments in owned] == [10] * 5


def test_replicas_that_are_cut_differently_are_refused() -> None:
    spec = TensorSpec("w", "F32", (4,))
    whole, half = Fragment(spec, spec.whole), Fragment(spec, Box((0,), (2,)))
    with pytest.raises(LayoutError, match=r"'w' of shape \(4,\): item \[0\] is held by 2"):
        plan_save([[whole], [half]])


def test_byte_ranges_that_are_close_are_read_as_one() -> None:
    grid = Grid(((0, 4, 8), (0, 6)))
    rows = plan_load(grid, (1, 0), (64, 8), 4, Box((0, 2), (8, 2)))
    assert byte_ranges(rows, 4, 0) == [(0, 16, 96), (1, 72, 152)]
    both = [CopyStep(0, 0, Box((0,), (9,)), Box((b,), (2,))) for b in (6, 0, 3)]
    assert byte_ranges(both, 1, 0) == [(0, 0, 2), (0, 3, 5), (0, 6, 8)]
    assert byte_ranges(both, 1, 1) == [(0, 0, 8)]
    assert byte_ranges([*both, *both], 2, 0) == [(0, 0, 4), (0, 6, 10), (0, 12, 16)]
    assert byte_ranges([], 1, 0) == []


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
