"""Generations and what they inherit (pure).

A generation is one attempt of a job that wrote a checkpoint. It has a parent generation and the
step that it continued from (the fork): of the parent it inherits the steps up to the fork.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
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
    owner: str = ""
    """Who began it, for people; no two attempts have the same."""


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
            "owner": generation.owner,
        },
    )


def decode_generation(data: bytes, path: Path | str) -> Generation:
    """Inverse of ``encode_generation``; raises ManifestError and its kinds."""
    m = decode_record(data, "everstep_generation", GENERATION_VERSION, path)
    number, parent, fork = m.get("number"), m.get("parent"), m.get("fork_step")
    created_s, mesh, owner = m.get("created_s"), m.get("mesh"), m.setdefault("owner", "")
    good = (
        m.keys() >= {f.name for f in fields(Generation)}
        and _natural(number)
        and (parent is None) == (fork is None)
        and (parent is None or (_natural(parent) and parent < number and _natural(fork)))
        and type(created_s) is float
        and isinstance(mesh, dict)
        and all(map(_natural, mesh.values()))
        and isinstance(owner, str)
    )
    if not good:
        raise ManifestError(path, "its content is not a generation")
    return Generation(**{f.name: m[f.name] for f in fields(Generation)})


def first_generation() -> Generation:
    """What the record of generation 1 says about lineage, whatever became of its file.

    A parent has a smaller number, so that the first generation has none.
    """
    return Generation(number=1, parent=None, fork_step=None, created_s=0.0, mesh={})


def generation_from(number: int, lineage: Mapping[str, Any], path: Path | str) -> Generation:
    """What a lost record said, from the ``lineage`` member of a manifest of that generation.

    Raises:
        ManifestError: it says nothing, or nothing sensible.
    """
    record = {"number": number, "created_s": 0.0, "mesh": {}, **lineage}
    return decode_generation(encode_record("everstep_generation", 1, record), path)


def _natural(value: object) -> bool:
    return type(value) is int and value >= 0


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
