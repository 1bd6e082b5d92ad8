"""From what a person writes to a checkpoint: a run directory, its checkpoints, one step, PATH@N."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.errors import CheckpointError
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.step_keys import GENERATIONS, step_id_of, step_key
from everstep.checkpoint.step_reader import StepReader
from everstep.checkpoint.store import Folder
from everstep.checkpoint.stores import is_url, open_store, without_scheme

_AT_STEP = re.compile(r"(.+)@(\d{1,18})")
_OF_A_RUN = "checkpoints"
_NOTHING = "holds no checkpoints"
_PLACES = "name a run directory, its checkpoints directory, or the directory of one step"


class PlaceError(CheckpointError):
    """What was written does not name a directory of checkpoints, or there is nothing in it."""

    def __init__(self, where: str, problem: str, way_out: str = _PLACES) -> None:
        super().__init__(where, problem, way_out)
        self.where, self.problem, self.way_out = where, problem, way_out

    def __str__(self) -> str:
        return f"{self.where} {self.problem}: {self.way_out}"


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
            raise PlaceError(self.name, "is needed whole, not one step of it", "name no step")

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
    def open(self, step_id: StepId | None = None, *, threads: int = 1) -> Iterator[StepReader]:
        """A reader of a committed step, which is not deleted by its job meanwhile.

        Args:
            step_id: which; None: the one that is meant.
            threads: copy threads.

        Raises:
            CheckpointError: see ``chosen``.
            ManifestError: the manifest is missing or damaged.
        """
        step_id = step_id or self.chosen()
        with (
            self.directory.held(step_id),
            self.directory.reader(step_id, threads=threads) as reader,
        ):
            yield reader


def open_place(
    text: str | os.PathLike[str],
    step: int | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
) -> Place:
    """The place that somebody has written.

    Args:
        text: path or URL of a run directory, its checkpoints directory, or the directory of a
            step; ``@N`` at the end asks for step N.
        step: the same, as an option.
        storage_options: of the URL's file system.

    Raises:
        PlaceError: it is none of these, or two different steps are asked for.
        CheckpointError: the URL's file system is unknown or cannot be reached.
    """
    found = find_place(text, step, storage_options=storage_options)
    if found is None:
        where, _ = _at_step(without_scheme(os.fspath(text)), step)
        raise PlaceError(where, _NOTHING if Path(where).is_dir() else "is not a directory")
    return found


def find_place(
    text: str | os.PathLike[str],
    step: int | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
) -> Place | None:
    """As ``open_place``; None for a local path without checkpoints of ours: it may be others'."""
    text = without_scheme(os.fspath(text))
    where, at_step = _at_step(text, step)
    if not is_url(where):
        if not Path(where).is_dir():
            return None
        where = str(Path(where).resolve()) if Path(where).name in ("", "..") else where
    above, _, last = where.rpartition("/")
    exact = step_id_of(last)
    if exact is not None:
        if at_step not in (None, exact.step):
            problem = f"is the directory of step {exact.step}, not of step {at_step}"
            raise PlaceError(text, problem, "name one step")
        return Place(_directory(above or ".", storage_options), exact=exact)
    here = _directory(where, storage_options)
    try:
        names = here.store.list()
    except OSError as error:
        if not is_url(where):
            raise
        raise CheckpointError(
            f"{where!r} cannot be reached: {error.strerror}; check the URL, its options and the "
            "credentials"
        ) from error
    if _OF_A_RUN in names:
        return Place(_directory(f"{where}/{_OF_A_RUN}", storage_options), at_step)
    # One that is empty yet; not other people's checkpoints, which are in files.
    is_new = last == _OF_A_RUN and not any(name.endswith(".safetensors") for name in names)
    if is_new or GENERATIONS in names or any(map(step_id_of, names)):
        return Place(here, at_step)
    if is_url(where):
        raise PlaceError(where, _NOTHING)
    return None


def without_step(text: str) -> str:
    """What is before ``@N`` at the end of a place; the text itself where that is not there."""
    match = _AT_STEP.fullmatch(text)
    return match[1] if match else text


def _at_step(text: str, step: int | None) -> tuple[str, int | None]:
    """What is before ``@N``, and N, if that is how the text ends; raises PlaceError."""
    match = _AT_STEP.fullmatch(text)
    if match is None or Path(text).exists():
        return text.rstrip("/") or "/", step
    if step not in (None, int(match[2])):
        raise PlaceError(text, f"asks for another step than --step {step}", "name one step")
    return match[1].rstrip("/") or "/", int(match[2])


def _directory(where: str, storage_options: Mapping[str, Any] | None) -> CheckpointDirectory:
    # Nothing is saved there, so that a store on which two jobs could mix is as good as another.
    return CheckpointDirectory(
        open_store(where, storage_options=storage_options, single_writer=True)
    )
