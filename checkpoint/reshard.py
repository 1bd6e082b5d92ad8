"""Who writes what, and which bytes fill a wanted box (pure)."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from everstep.checkpoint.errors import LayoutError
from everstep.checkpoint.layout import Box, Fragment, Grid, TensorSpec


def plan_save(layouts: Sequence[Sequence[Fragment]]) -> list[list[Fragment]]:
    """Choose one writer for each fragment.

    Args:
        layouts: for each rank, the non-empty fragments that it holds.

    Returns:
        For each rank the fragments that it writes. Each distinct fragment appears exactly once;
        replicated ones go, largest first, to the holder with the fewest bytes so far. The answer
        depends on the arguments only, so every rank computes the same one.

    Raises:
        LayoutError: ranks disagree about a tensor's dtype or shape.
    """
    holders: dict[Fragment, list[int]] = defaultdict(list)
    specs: dict[str, TensorSpec] = {}
    for rank, fragments in enumerate(layouts):
        for fragment in fragments:
            holders[fragment].append(rank)
            known = specs.setdefault(fragment.spec.name, fragment.spec)
            if known != fragment.spec:
                raise LayoutError(
                    f"tensor {known.name!r} is {known.dtype} {known.shape} on one rank and "
                    f"{fragment.spec.dtype} {fragment.spec.shape} on rank {rank}"
                )
    load_bytes = [0] * len(layouts)
    owned: list[list[Fragment]] = [[] for _ in layouts]
    order = sorted(holders, key=lambda f: (len(holders[f]) > 1, -f.size_bytes, f))
    for fragment in order:
        owner = min(holders[fragment], key=lambda r: (load_bytes[r], r))
        owned[owner].append(fragment)
        load_bytes[owner] += fragment.size_bytes
    return owned


@dataclass(frozen=True)
class CopyStep:
    """Fill ``box`` of a tensor from the fragment ``cell`` that lies in pack number ``pack``."""

    pack: int
    cell: Box
    box: Box


def plan_load(grid: Grid, packs: Sequence[int], wanted: Box) -> list[CopyStep]:
    """The copies that fill a wanted box of a tensor, each item exactly once.

    Args:
        grid: the grid of the stored tensor.
        packs: for each cell in C order, the pack that holds it.
        wanted: the box to fill; an empty one needs no copy.
    """
    if not wanted.size:
        return []
    steps = []
    for index, cell in grid.overlapping(wanted):
        common = cell.intersect(wanted)
        if common is not None:
            steps.append(CopyStep(packs[index], cell, common))
    return steps


def layout_differences(
    wanted: Mapping[str, tuple[str, tuple[int, ...]]],
    stored: Mapping[str, tuple[str, tuple[int, ...]]],
) -> list[str]:
    """What keeps a checkpoint from being loaded: one phrase for each tensor that does not match.

    Both arguments map logical names to (dtype, global shape).
    """
    found = [
        f"tensor {n!r} is not in the checkpoint" for n in sorted(wanted.keys() - stored.keys())
    ]
    found += [
        f"the checkpoint's tensor {n!r} is not in this run"
        for n in sorted(stored.keys() - wanted.keys())
    ]
    for name in sorted(wanted.keys() & stored.keys()):
        if wanted[name] != stored[name]:
            found.append(
                f"tensor {name!r} is {stored[name][0]} {list(stored[name][1])} in the checkpoint "
                f"and {wanted[name][0]} {list(wanted[name][1])} in this run"
            )
    return found


def mark_held(held: Collection[str], stored: Collection[str]) -> str:
    """Which of the ``stored`` names a rank holds: a bit set in hex, small enough to exchange."""
    return f"{sum(1 << index for index, name in enumerate(sorted(stored)) if name in held):x}"


def held_nowhere(stored: Collection[str], marks: Iterable[str]) -> set[str]:
    """The ``stored`` names that no rank holds, given every rank's ``mark_held`` of the same."""
    held = 0
    for mark in marks:
        held |= int(mark, 16)
    return {name for index, name in enumerate(sorted(stored)) if not held >> index & 1}
