"""``everstep ckpt gc``: deletes what no run needs any more, as the next save of its job would."""

import time
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from everstep.checkpoint.commit import GRACE_S, CheckpointDirectory
from everstep.checkpoint.errors import CheckpointError
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.lock import DirectoryLock
from everstep.checkpoint.open_place import Place
from everstep.checkpoint.retention import abandoned, superfluous
from everstep.ckpt_survey import Survey, survey
from everstep.ckpt_text import print_table, say
from everstep.words import plural, size_words

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class Superfluous:
    """A step that may go."""

    step_id: StepId
    path: str
    size_bytes: int
    why: str


@dataclass(frozen=True)
class Collected:
    """What became of the steps that may go."""

    deleted: tuple[Superfluous, ...]
    left: tuple[Superfluous, ...]
    """Those that somebody is reading, or that cannot be deleted."""


def plan_gc(
    found: Survey, garbage: Collection[StepId], newest_generation: int, keep: int | None
) -> list[Superfluous]:
    """What to delete (pure), ascending by step: half-written steps, and what retention drops.

    Args:
        found: all steps.
        garbage: the half-written ones that nobody can be writing.
        newest_generation: its number, whether it has committed anything or not.
        keep: how many of the newest steps of the lineage to keep; None: all.

    Raises:
        CheckpointError: it cannot be told which steps belong to the newest run.
    """
    if found.problem is not None:
        raise CheckpointError(f"nothing is deleted while {found.problem}")
    committed = [f.step_id for f in found.steps if f.committed]
    lineage = [f.step_id for f in found.steps if f.committed and f.in_lineage]
    gone = set(superfluous(committed, lineage, keep or max(1, len(lineage)), newest_generation))
    plan = []
    for facts in found.steps:
        if facts.step_id in garbage:
            why = "half-written"
        elif facts.step_id in gone:
            why = f"not among the newest {keep}" if facts.in_lineage else "outside the lineage"
        else:
            continue
        plan.append(
            Superfluous(
                step_id=facts.step_id, path=facts.path, size_bytes=facts.size_bytes, why=why
            )
        )
    return plan


def collect(place: Place, keep: int | None, *, dry_run: bool) -> Collected:
    """Delete what is superfluous, or only say what that is.

    Raises:
        DirectoryInUseError: a job writes there; not with ``dry_run``.
        CheckpointError: the lineage is not known.
        OSError: something cannot be deleted.
    """
    directory = place.directory
    if dry_run:
        return Collected(tuple(_plan(directory, keep)), ())
    with DirectoryLock(directory.root) if directory.has_lock else nullcontext():
        newest = directory.newest_generation()
        plan = _plan(directory, keep)
        retained = keep or max(1, len(directory.lineage()))
        gone = {*directory.collect_garbage(), *directory.retire(retained, newest)}
    return Collected(
        tuple(item for item in plan if item.step_id in gone),
        tuple(item for item in plan if item.step_id not in gone),
    )


def gc_json(place: Place, found: Collected, *, dry_run: bool) -> dict[str, Any]:
    """What was deleted, or would be."""
    return {
        "place": place.name,
        "dry_run": dry_run,
        "freed_bytes": sum(item.size_bytes for item in found.deleted),
        "deleted": [_item_json(item) for item in found.deleted],
        "left": [_item_json(item) for item in found.left],
    }


def print_gc(console: "Console", found: dict[str, Any]) -> None:
    """What ``gc_json`` gave, for people."""
    rows = [
        (str(d["step"]), str(d["generation"]), size_words(d["size_bytes"]), d["why"])
        for d in found["deleted"]
    ]
    if rows:
        print_table(console, ("step", "generation", "size", "why"), rows, right=(0, 1, 2))
    for item in found["left"]:
        say(console, f"{item['path']} is left: somebody reads it, or it cannot be deleted")
    done = "would free" if found["dry_run"] else "freed"
    say(console, f"{done} {size_words(found['freed_bytes'])} in {plural(len(rows), 'step')}")


def _item_json(item: Superfluous) -> dict[str, Any]:
    return {
        "step": item.step_id.step,
        "generation": item.step_id.generation,
        "path": item.path,
        "size_bytes": item.size_bytes,
        "why": item.why,
    }


def _plan(directory: CheckpointDirectory, keep: int | None) -> list[Superfluous]:
    found = survey(directory)
    garbage = [facts.step_id for facts in found.steps if not facts.committed]
    if found.problem is None and not directory.has_lock:
        committed = [facts.step_id for facts in found.steps if facts.committed]
        garbage = abandoned(
            garbage, committed, directory.generations(), now_s=time.time(), grace_s=GRACE_S
        )
    return plan_gc(found, garbage, directory.newest_generation(), keep)
