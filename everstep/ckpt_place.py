"""From what a person writes to a checkpoint: a run directory, its checkpoints, one step, PATH@N."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.errors import CheckpointError, DamagedError, ManifestError
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.manifest import Manifest
from everstep.checkpoint.step_keys import GENERATIONS, manifest_key, step_key, steps_in
from everstep.checkpoint.step_reader import StepReader
from everstep.checkpoint.store import Folder
from everstep.checkpoint.stores import is_url, open_store

_AT_STEP = re.compile(r"(.+)@(\d{1,18})")
_STEP_NAME = re.compile(r"step-(\d{8,18})-g(\d{5,9})")
_OF_A_RUN = "checkpoints"


class PlaceError(CheckpointError):
    """What was written does not name a directory of checkpoints, or there is nothing in it."""

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(where, problem)
        self.where, self.problem = where, problem

    def __str__(self) -> str:
        return (
            f"{self.where} {self.problem}: name a run directory, its checkpoints directory, or "
            "the directory of one step"
        )


@dataclass(frozen=True)
class Place:
    """A directory of checkpoints, and which of them is meant."""

    directory: CheckpointDirectory
    step: int | None = None
    """As it was asked for; None: the newest."""
    exact: StepId | None = None
    """The step whose directory was named, in the lineage or not."""

    @property
    def name(self) -> str:
        """The path or URL of the directory."""
        return self.directory.describe()

    def check_whole(self) -> None:
        """Raises PlaceError where one step was named and the whole directory is needed."""
        if self.step is not None or self.exact is not None:
            raise PlaceError(self.name, "is needed whole, not one step of it")

    def chosen(self) -> StepId:
        """The step that is meant.

        Raises:
            StepNotFoundError: it is not there, or outside the lineage.
            PlaceError: no step has been saved.
            ManifestError: the record of a generation is damaged.
        """
        if self.exact is not None:
            return self.exact
        found = self.directory.find(self.step)
        if found is None:
            raise PlaceError(self.name, "has no checkpoint yet")
        return found

    def path(self, step_id: StepId) -> str:
        """Where a step is, for people."""
        return self.directory.describe(step_id)

    def files(self, step_id: StepId) -> Folder:
        """The files of a step, by name."""
        return Folder(self.directory.store, step_key(step_id))

    @contextmanager
    def open(self, step_id: StepId, *, threads: int = 1) -> Iterator[StepReader]:
        """A reader of a committed step, which is not deleted by its job meanwhile.

        Raises:
            ManifestError: the manifest is missing or damaged.
        """
        with (
            self.directory.held(step_id),
            self.directory.reader(step_id, threads=threads) as reader,
        ):
            yield reader


def open_place(
    text: str, step: int | None = None, *, storage_options: Mapping[str, Any] | None = None
) -> Place:
    """The place that somebody has written.

    Args:
        text: path or URL of a run directory, its checkpoints directory, or the directory of a
            step; ``@N`` at the end asks for step N.
        step: the same, as an option.
        storage_options: of the URL's file system.

    Raises:
        PlaceError: it is none of these.
        CheckpointError: the URL's file system is unknown or cannot be reached.
    """
    where, at_step = text.rstrip("/") or "/", _AT_STEP.fullmatch(text)
    if at_step and not Path(text).exists():
        where = at_step[1].rstrip("/") or "/"
        if step is not None and step != int(at_step[2]):
            raise PlaceError(text, f"asks for another step than --step {step}")
        step = int(at_step[2])
    if not is_url(where):
        if not Path(where).is_dir():
            raise PlaceError(where, "is not a directory")
        where = str(Path(where).resolve()) if Path(where).name in ("", "..") else where
    above, _, last = where.rpartition("/")
    exact = step_id_of(last)
    if exact is not None:
        if step not in (None, exact.step):
            raise PlaceError(text, f"is the directory of step {exact.step}, not of step {step}")
        return Place(_directory(above or ".", storage_options), exact=exact)
    names = _directory(where, storage_options).store.list()
    if _OF_A_RUN in names:
        return Place(_directory(f"{where}/{_OF_A_RUN}", storage_options), step)
    if last == _OF_A_RUN or GENERATIONS in names or any(map(step_id_of, names)):
        return Place(_directory(where, storage_options), step)
    raise PlaceError(where, "holds no checkpoints")


def _directory(where: str, storage_options: Mapping[str, Any] | None) -> CheckpointDirectory:
    # Nothing is saved there, so that a store on which two jobs could mix is as good as another.
    return CheckpointDirectory(
        open_store(where, storage_options=storage_options, single_writer=True)
    )


def step_id_of(name: str) -> StepId | None:
    """The step whose directory has this name; None where it is not such a name."""
    match = _STEP_NAME.fullmatch(name)
    return StepId(int(match[2]), int(match[1])) if match else None


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
