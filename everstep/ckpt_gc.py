"""``everstep ckpt gc``: deletes what no run needs any more, as the next save of its job would."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from everstep.checkpoint.errors import CheckpointError
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.lock import DirectoryLock
from everstep.checkpoint.retention import superfluous
from everstep.ckpt_place import Place, Survey, survey
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


def plan_gc(found: Survey, newest_generation: int, keep: int | None) -> list[Superfluous]:
    """What to delete (pure), ascending by step: half-written steps, and what retention drops.

    Args:
        found: all steps.
        newest_generation: its number, whether it has committed anything or not.
        keep: how many of the newest steps of the lineage to keep; None: all.

    Raises:
        CheckpointError: it cannot be told which steps belong to the newest run.
    """
    if found.problem is not None:
        raise CheckpointError(f"nothing is deleted while {found.problem}")
    committed = [f.step_id for f in found.steps if f.committed]
    lineage = [f.step_id for f in found.steps if f.committed and f.in_lineage]
    kept = max(1, len(lineage)) if keep is None else keep
    gone = set(superfluous(committed, lineage, kept, newest_generation))
    plan = []
    for facts in found.steps:
        if not facts.committed:
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


def collect(place: Place, keep: int | None, *, dry_run: bool) -> list[Superfluous]:
    """Delete what is superfluous, or only say what that is.

    Raises:
        DirectoryInUseError: a job writes there; not with ``dry_run``.
        CheckpointError: the lineage is not known.
        OSError: something cannot be deleted.
    """
    if dry_run:
        return _plan(place, keep)
    with DirectoryLock(place.directory.root):
        plan = _plan(place, keep)
        for item in plan:
            place.directory.delete(item.step_id)
    return plan


def gc_json(place: Place, plan: Sequence[Superfluous], *, dry_run: bool) -> dict[str, Any]:
    """What was deleted, or would be."""
    return {
        "place": place.name,
        "dry_run": dry_run,
        "freed_bytes": sum(item.size_bytes for item in plan),
        "deleted": [
            {
                "step": item.step_id.step,
                "generation": item.step_id.generation,
                "path": item.path,
                "size_bytes": item.size_bytes,
                "why": item.why,
            }
            for item in plan
        ],
    }


def print_gc(console: "Console", found: dict[str, Any]) -> None:
    """What ``gc_json`` gave, for people."""
    rows = [
        (str(d["step"]), str(d["generation"]), size_words(d["size_bytes"]), d["why"])
        for d in found["deleted"]
    ]
    if rows:
        print_table(console, ("step", "generation", "size", "why"), rows, right=(0, 1, 2))
    done = "would free" if found["dry_run"] else "freed"
    say(console, f"{done} {size_words(found['freed_bytes'])} in {plural(len(rows), 'step')}")


def _plan(place: Place, keep: int | None) -> list[Superfluous]:
    found = survey(place.directory)
    newest = 0 if found.problem else max(place.directory.generations(), default=0)
    return plan_gc(found, newest, keep)
