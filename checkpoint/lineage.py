"""Generations and what they inherit (pure).

A generation is one attempt of a job that wrote a checkpoint. It has a parent generation and the
step that it continued from (the fork): of the parent it inherits the steps up to the fork.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from everstep.checkpoint.errors import ManifestError
from everstep.checkpoint.records import decode_record, encode_record

GENERATION_VERSION = 1


class StepId(NamedTuple):
    """Identity of a checkpoint: never the step alone."""

    generation: int
    step: int


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One attempt that wrote checkpoints."""

    number: int
    parent: int | None
    fork_step: int | None
    """Step of the parent that this one continued from; None when it began from nothing."""
    created_s: float
    """Seconds since the epoch."""
    mesh: Mapping[str, int]


def encode_generation(generation: Generation) -> bytes:
    """The bytes of a generation file."""
    return encode_record(
        "everstep_generation",
        GENERATION_VERSION,
        {
            "number": generation.number,
            "parent": generation.parent,
            "fork_step": generation.fork_step,
            "created_s": generation.created_s,
            "mesh": dict(generation.mesh),
        },
    )


def decode_generation(data: bytes, path: object) -> Generation:
    """Inverse of ``encode_generation``; raises ManifestError and its kinds."""
    m = decode_record(data, "everstep_generation", GENERATION_VERSION, str(path))
    number, parent, fork = m.get("number"), m.get("parent"), m.get("fork_step")
    good = (
        type(number) is int
        and (parent is None) == (fork is None)
        and (parent is None or (type(parent) is int and 0 < parent < number))
        and (fork is None or type(fork) is int)
        and isinstance(m.get("created_s"), float | int)
        and isinstance(m.get("mesh"), dict)
    )
    if not good:
        raise ManifestError(str(path), "its content is not a generation")
    values: dict[str, Any] = {k: m[k] for k in ("number", "parent", "fork_step", "mesh")}
    return Generation(created_s=float(m["created_s"]), **values)


def in_lineage(
    generations: Mapping[int, Generation], steps: Iterable[StepId], tip: int | None = None
) -> list[StepId]:
    """The steps that a generation may resume from, in ascending order of step.

    Args:
        generations: all of them, by number.
        steps: all committed checkpoints.
        tip: the generation; None for the newest.

    Where a generation saved a step again that it inherits, its own counts.
    """
    if not generations:
        return []
    by_generation: dict[int, list[int]] = {}
    for generation, step in steps:
        by_generation.setdefault(generation, []).append(step)
    chosen: dict[int, StepId] = {}
    current: Generation | None = generations.get(max(generations) if tip is None else tip)
    limit = float("inf")
    while current is not None:
        for step in by_generation.get(current.number, []):
            if step <= limit and step not in chosen:
                chosen[step] = StepId(current.number, step)
        if current.parent is None or current.fork_step is None:
            break
        limit = min(limit, current.fork_step)
        current = generations.get(current.parent)
    return [chosen[step] for step in sorted(chosen)]
