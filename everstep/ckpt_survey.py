"""What there is in a directory of checkpoints: every step, committed or not, whole or not."""

from dataclasses import dataclass

from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.errors import DamagedError, ManifestError
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.manifest import Manifest
from everstep.checkpoint.step_keys import manifest_key, step_key, steps_in
from everstep.checkpoint.store import Folder


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """One step, committed or not, as far as it can be told without reading packs."""

    step_id: StepId
    path: str
    committed: bool
    in_lineage: bool | None
    """None where it cannot be told, because the record of a generation is damaged."""
    problem: str | None
    """Why it is not whole."""
    size_bytes: int
    """Of the packs by the manifest, or else of those that are there."""
    manifest: Manifest | None
    saved_s: float | None
    """When it was committed, in seconds since the epoch; None where it was not, or on a URL."""


@dataclass(frozen=True)
class Survey:
    """All steps of a directory, ascending by step and generation."""

    steps: tuple[StepFacts, ...]
    problem: str | None
    """Why nothing can be said of the lineage."""


def survey(directory: CheckpointDirectory) -> Survey:
    """Look at every step of a directory; what is damaged is told, not raised."""
    begun, committed = set(steps_in(directory.store)), set(directory.committed())
    lineage: set[StepId] | None = None
    problem = None
    try:
        lineage = set(directory.lineage())
    except ManifestError as error:
        problem = str(error)
    steps = [
        _look_at(directory, step_id, step_id in committed, lineage)
        for step_id in sorted(begun | committed, key=lambda s: (s.step, s.generation))
    ]
    return Survey(tuple(steps), problem)


def _look_at(
    directory: CheckpointDirectory,
    step_id: StepId,
    committed: bool,
    lineage: set[StepId] | None,
) -> StepFacts:
    folder = Folder(directory.store, step_key(step_id))
    manifest, problem = None, None
    if committed:
        try:
            manifest = directory.manifest(step_id)
            problem = _missing(manifest, folder)
        except (DamagedError, OSError) as error:
            problem = f"manifest: {error.what if isinstance(error, DamagedError) else error}"
    return StepFacts(
        step_id=step_id,
        path=directory.describe(step_id),
        committed=committed,
        in_lineage=None if lineage is None else step_id in lineage,
        problem=problem,
        size_bytes=manifest.size_bytes if manifest else _size_bytes(folder),
        manifest=manifest,
        saved_s=_saved_s(directory, step_id) if committed else None,
    )


def _missing(manifest: Manifest, folder: Folder) -> str | None:
    """What is wrong with the packs, as far as names and sizes tell.

    Object stores show whole objects only: there, names tell everything, in one request.
    """
    names = set(folder.store.list(folder.folder))
    is_local = folder.store.local_path() is not None
    wrong = []
    for record in manifest.packs:
        files = {record.file: record.size_bytes, record.table_file: record.table_file_bytes}
        for file, expected_bytes in files.items():
            if file not in names:
                wrong.append(f"{file} is missing")
            elif is_local and (size_bytes := folder.size(file)) != expected_bytes:
                wrong.append(f"{file} has {size_bytes} bytes, expected {expected_bytes}")
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return f"{wrong[0]}{more}" if wrong else None


def _size_bytes(folder: Folder) -> int:
    """Of the packs that are there."""
    names = folder.store.list(folder.folder)
    return sum(folder.size(name) or 0 for name in names if name.endswith(".safetensors"))


def _saved_s(directory: CheckpointDirectory, step_id: StepId) -> float | None:
    """When the manifest was written, where the file system tells."""
    path = directory.store.local_path(manifest_key(step_id))
    try:
        return None if path is None else path.stat().st_mtime
    except FileNotFoundError:  # deleted meanwhile
        return None
