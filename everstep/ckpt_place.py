"""From what a person writes to a checkpoint: a run directory, its checkpoints, one step, PATH@N."""

import re
from dataclasses import dataclass
from pathlib import Path

from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.errors import CheckpointError, DamagedError, ManifestError
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.manifest import Manifest
from everstep.checkpoint.step_reader import StepReader
from everstep.checkpoint.verify import StepFiles

_AT_STEP = re.compile(r"(.+)@(\d{1,18})")
_STEP_NAME = re.compile(r"step-(\d{8,18})-g(\d{5,9})")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
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
        """The path of the directory."""
        return str(self.directory.root)

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
        return str(self.directory.step_path(step_id))

    def files(self, step_id: StepId) -> StepFiles:
        """The files of a step, by name."""
        return _LocalFiles(self.directory.step_path(step_id))

    def open(self, step_id: StepId, *, threads: int = 1) -> StepReader:
        """A reader of a committed step; raises ManifestError and its kinds."""
        manifest = self.directory.manifest(step_id)
        return StepReader(self.directory.step_path(step_id), manifest, threads=threads)


@dataclass(frozen=True)
class _LocalFiles:
    """See ``StepFiles``."""

    path: Path

    def size(self, name: str) -> int | None:
        try:
            return (self.path / name).stat().st_size
        except FileNotFoundError:
            return None

    def read(self, name: str, offset: int, length: int) -> bytes:
        with (self.path / name).open("rb") as file:
            file.seek(offset)
            return file.read(length)


def open_place(text: str, step: int | None = None) -> Place:
    """The place that somebody has written.

    Args:
        text: a run directory, its checkpoints directory, or the directory of a step; ``@N`` at the
            end asks for step N.
        step: the same, as an option.

    Raises:
        PlaceError: it is none of these.
    """
    path, at_step = Path(text), _AT_STEP.fullmatch(text)
    if at_step and not path.exists():
        path = Path(at_step[1])
        if step is not None and step != int(at_step[2]):
            raise PlaceError(text, f"asks for another step than --step {step}")
        step = int(at_step[2])
    if _URL.match(text):
        raise PlaceError(text, "is a URL")
    if not path.is_dir():
        raise PlaceError(str(path), "is not a directory")
    exact = step_id_of(path.resolve().name)
    if exact is not None:
        if step not in (None, exact.step):
            raise PlaceError(text, f"is the directory of step {exact.step}, not of step {step}")
        return Place(CheckpointDirectory(path.resolve().parent), exact=exact)
    if (path / _OF_A_RUN).is_dir():
        return Place(CheckpointDirectory(path / _OF_A_RUN), step)
    if (path / "generations").is_dir() or any(step_id_of(p.name) for p in path.iterdir()):
        return Place(CheckpointDirectory(path), step)
    if path.name == _OF_A_RUN:
        return Place(CheckpointDirectory(path), step)
    raise PlaceError(str(path), "holds no checkpoints")


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
    """Of the packs by the manifest, or else of the files that are there."""
    manifest: Manifest | None
    saved_s: float | None
    """When it was committed, in seconds since the epoch; None where it was not."""


@dataclass(frozen=True)
class Survey:
    """All steps of a directory, ascending by step and generation."""

    steps: tuple[StepFacts, ...]
    problem: str | None
    """Why nothing can be said of the lineage."""


def survey(directory: CheckpointDirectory) -> Survey:
    """Look at every step of a directory; what is damaged is told, not raised."""
    begun = {s for path in directory.root.iterdir() if (s := step_id_of(path.name)) is not None}
    committed = set(directory.committed())
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
    path = directory.step_path(step_id)
    sizes = _file_sizes(path)
    manifest, problem = None, None
    if committed:
        try:
            manifest = directory.manifest(step_id)
            problem = _missing(manifest, sizes)
        except (DamagedError, OSError) as error:
            problem = f"manifest: {error.what if isinstance(error, DamagedError) else error}"
    return StepFacts(
        step_id=step_id,
        path=str(path),
        committed=committed,
        in_lineage=None if lineage is None else step_id in lineage,
        problem=problem,
        size_bytes=manifest.size_bytes if manifest else sum(sizes.values()),
        manifest=manifest,
        saved_s=_saved_s(path) if committed else None,
    )


def _missing(manifest: Manifest, sizes: dict[str, int]) -> str | None:
    wrong = [
        f"{record.file} is missing"
        if record.file not in sizes
        else f"{record.file} has {sizes[record.file]} bytes, expected {record.size_bytes}"
        for record in manifest.packs
        if sizes.get(record.file) != record.size_bytes
    ]
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return f"{wrong[0]}{more}" if wrong else None


def _file_sizes(path: Path) -> dict[str, int]:
    try:
        return {p.name: p.stat().st_size for p in path.iterdir() if p.is_file()}
    except FileNotFoundError:  # deleted meanwhile
        return {}


def _saved_s(path: Path) -> float | None:
    try:
        return (path / "manifest.json").stat().st_mtime
    except FileNotFoundError:
        return None
