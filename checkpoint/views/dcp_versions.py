"""One path that is one checkpoint, replaced by each save: versions in a checkpoint directory.

::

    incoming/rank-00003-<8 hex>.safetensors   packs of a save that has not committed yet
    generations/, step-<n>-g<m>/              as everywhere; one save is one generation and one step

A save that begins supersedes every other to the path that has not ended: it deletes their packs, so
that at most one of them commits what it wrote and none can commit a part. The newest committed step
counts; older ones are deleted after a commit, except while a reader holds them. The presence of
``incoming`` tells this use of a directory from a run's own, whose steps are never replaced.
"""

import contextlib
import fcntl
import os
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from everstep.checkpoint.collective import describe
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.direct_io import make_directory
from everstep.checkpoint.errors import CheckpointError, ManifestError
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.lock import DirectoryLock
from everstep.checkpoint.manifest import MANIFEST_VERSION, Manifest, Part
from everstep.checkpoint.records import decode_record, read_bytes
from everstep.checkpoint.views.dcp_contents import OBJECT

INCOMING = "incoming"
_MANIFEST = "manifest.json"
_TRIES = 10
"""A reader looks again when the version that it has found is replaced under its hands."""


class SupersededError(CheckpointError):
    """A later save to the same path has begun before this one could commit."""

    def __init__(self, path: str, missing: str) -> None:
        super().__init__(path, missing)
        self.path, self.missing = path, missing

    def __str__(self) -> str:
        return (
            f"the save to {self.path} was superseded: its pack {self.missing} is gone because a "
            "later save to the same path has begun, or because not all ranks share this "
            "directory; wait for one save before you begin the next"
        )


class HeldVersion:
    """A committed step that no save deletes until ``close``, or until this object is collected."""

    def __init__(self, step_id: StepId, path: Path, manifest: Manifest, descriptor: int) -> None:
        self.step_id, self.path, self.manifest = step_id, path, manifest
        self.close: Callable[[], object] = weakref.finalize(self, os.close, descriptor)


def local_path(path: str | os.PathLike[str]) -> Path:
    """The path of a checkpoint; raises CheckpointError where it is a URL."""
    if "://" in os.fspath(path):
        raise CheckpointError(
            f"{os.fspath(path)} is a URL: checkpoints of DCP are kept in a local or shared "
            "directory; give its path"
        )
    return Path(path)


def begin(root: Path) -> None:
    """Make a path ready for a save, on one rank, before any rank writes a pack.

    Raises:
        CheckpointError: the path holds something that a save must not replace.
        DirectoryInUseError: a save is being committed there, or a run writes there.
        OSError: as the file system reports it.
    """
    if _taken(root):
        raise CheckpointError(
            f"{root} holds the checkpoints of a run, or one that another writer of DCP wrote: a "
            "save would replace it; choose another path, or remove it first"
        )
    with DirectoryLock(root):
        make_directory(root / INCOMING)
        for file in (root / INCOMING).iterdir():
            file.unlink(missing_ok=True)
        CheckpointDirectory(root).collect_garbage()


def commit(root: Path, parts: Sequence[Part]) -> StepId:
    """Make what all ranks have written the checkpoint of a path, on one rank.

    Args:
        root: the path.
        parts: what each rank wrote to ``incoming``, in order of rank; their generation and step
            are given here.

    Raises:
        SupersededError: a pack is gone.
        LayoutError: the parts do not hold each tensor exactly once.
        DirectoryInUseError: another save is being committed there.
        OSError: as the file system reports it; the path keeps the checkpoint that it had.
    """
    directory = CheckpointDirectory(root)
    with DirectoryLock(root):
        before = max(directory.committed(), default=None)
        step = 0 if before is None else before.step + 1
        generation = directory.create_generation(before, parts[0].context["mesh"]).number
        step_id = StepId(generation, step)
        path = directory.begin_step(step_id)
        try:
            for part in parts:
                try:
                    (root / INCOMING / part.pack.file).rename(path / part.pack.file)
                except FileNotFoundError:
                    raise SupersededError(str(root), part.pack.file) from None
                directory.put_part(replace(part, generation=generation, step=step))
            directory.commit(step_id, len(parts))
        except BaseException:
            with contextlib.suppress(OSError):
                directory.delete(step_id)
            raise
        try:
            _delete_older(directory, step_id)
        except OSError as e:
            warnings.warn(
                f"{root} is saved, but the version before could not be deleted: {describe(e)}",
                RuntimeWarning,
                stacklevel=2,
            )
    return step_id


def hold(root: Path, step: int | None = None) -> HeldVersion:
    """Open the newest checkpoint of a path (or one of the steps of a run) and keep it there.

    Raises:
        CheckpointError: there is none.
        StepNotFoundError: this step is not there.
        ManifestError: its manifest is damaged.
    """
    directory = CheckpointDirectory(root)
    for tries_left in reversed(range(_TRIES)):
        try:
            step_id = directory.find(step)
            descriptor = -1 if step_id is None else _lock(directory.step_path(step_id))
        except (FileNotFoundError, ManifestError):  # replaced meanwhile, if it is not damaged
            if tries_left:
                continue
            raise
        if step_id is None:
            break
        try:
            manifest = directory.manifest(step_id)
        except BaseException:
            os.close(descriptor)
            raise
        return HeldVersion(step_id, directory.step_path(step_id), manifest, descriptor)
    raise CheckpointError(
        f"{root} holds no checkpoint: give the path that one was saved to, or the checkpoint "
        "directory of a run"
    )


def _taken(root: Path) -> bool:
    """Whether there are checkpoints here that no save to this path has made."""
    if not (root / INCOMING).is_dir():
        return any((root / name).exists() for name in ("generations", ".metadata"))
    directory = CheckpointDirectory(root)
    return any(not _ours(directory.step_path(s) / _MANIFEST) for s in directory.committed())


def _ours(path: Path) -> bool:
    """Whether a version may be replaced: it was saved through DCP, or is damaged."""
    try:
        members = decode_record(read_bytes(path), "everstep_manifest", MANIFEST_VERSION, path)
    except ManifestError:
        return True
    objects = members.get("objects")
    return isinstance(objects, dict) and OBJECT in objects


def _lock(path: Path) -> int:
    """A descriptor that holds a shared lock of a manifest, which is still there by then."""
    descriptor = os.open(path / _MANIFEST, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # it is about to be deleted
            raise FileNotFoundError(str(path / _MANIFEST)) from None
        except OSError:  # a file system without locks: reading needs none
            pass
        os.stat(path / _MANIFEST)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _delete_older(directory: CheckpointDirectory, current: StepId) -> None:
    """Delete the versions that nobody reads, then the generations that have none left."""
    for step_id in directory.committed():
        if step_id != current:
            manifest = directory.step_path(step_id) / _MANIFEST
            with manifest.open("r+b") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                directory.delete(step_id)
    needed = {step_id.generation for step_id in directory.committed()}
    for record in (directory.root / "generations").glob("*.json"):
        if record.stem.isdecimal() and int(record.stem) not in needed:
            record.unlink(missing_ok=True)
