"""Names of what a directory of checkpoints holds, as keys of its store."""

import re
from typing import Any

from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.records import read_record
from everstep.checkpoint.store import Store

GENERATIONS = "generations"
MANIFEST = "manifest.json"
_STEP_NAME = re.compile(r"step-(\d{8,18})-g(\d{5,9})")
_GENERATION_NAME = re.compile(r"(\d{5,9})\.json")


def step_key(step_id: StepId) -> str:
    """Folder of a checkpoint."""
    return f"step-{step_id.step:08d}-g{step_id.generation:05d}"


def manifest_key(step_id: StepId) -> str:
    """The manifest of a checkpoint."""
    return f"{step_key(step_id)}/{MANIFEST}"


def part_key(step_id: StepId, rank: int) -> str:
    """The vote of a writer."""
    return f"{step_key(step_id)}/parts/{rank:05d}.json"


def generation_key(number: int) -> str:
    """The record of a generation."""
    return f"{GENERATIONS}/{number:05d}.json"


def step_id_of(name: str) -> StepId | None:
    """The checkpoint whose folder has this name; None where it is no such name."""
    match = _STEP_NAME.fullmatch(name)
    if match is None:
        return None
    step_id = StepId(int(match[2]), int(match[1]))
    return step_id if step_key(step_id) == name else None  # it may have surplus leading zeros


def steps_in(store: Store) -> list[StepId]:
    """Every step that has a folder, committed or not."""
    return [step_id for name in store.list() if (step_id := step_id_of(name)) is not None]


def is_committed(store: Store, step_id: StepId) -> bool:
    """Whether a step exists: its manifest does."""
    return store.size(manifest_key(step_id)) is not None


def recorded_generations(store: Store) -> list[int]:
    """Numbers of the generations that have a record, ascending."""
    matches = map(_GENERATION_NAME.fullmatch, store.list(GENERATIONS))
    return sorted(int(match[1]) for match in matches if match)


def put_once(store: Store, key: str, data: bytes, **options: Any) -> None:
    """Create an object; finding exactly these bytes there is success (a request sent twice).

    Raises:
        FileExistsError: there is an object with other bytes.
    """
    try:
        store.put(key, data, **options)
    except FileExistsError:
        if read_record(store, key) != data:
            raise
