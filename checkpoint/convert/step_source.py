"""A committed step of ours as the source of a conversion (no torch)."""

from collections.abc import Mapping
from pathlib import Path

from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.errors import CheckpointError
from everstep.checkpoint.layout import Box, TensorSpec
from everstep.checkpoint.manifest import decode_manifest
from everstep.checkpoint.pack import StridedBytes
from everstep.checkpoint.records import read_bytes
from everstep.checkpoint.step_reader import StepReader

_MANIFEST = "manifest.json"


class StepSource:
    """The tensors that a ``StepReader`` reads; the reader stays the caller's to close."""

    def __init__(self, reader: StepReader) -> None:
        self._reader = reader
        self.tensors: Mapping[str, TensorSpec] = {
            name: stored.spec for name, stored in reader.manifest.tensors.items()
        }

    def fill(self, name: str, wanted: Box, target: StridedBytes) -> None:
        """See ``Source``."""
        self._reader.fill(name, wanted, target)


def open_step(path: Path, *, threads: int = 1) -> StepReader:
    """A reader of the checkpoint at ``path``: one step, or the newest of a directory or run.

    Raises:
        CheckpointError: there is no committed checkpoint, or its manifest is damaged.
    """
    if (path / _MANIFEST).is_file():
        manifest = decode_manifest(read_bytes(path / _MANIFEST), path / _MANIFEST)
        return StepReader(path, manifest, threads=threads)
    directory = CheckpointDirectory(path / "checkpoints" if is_run(path) else path)
    step_id = directory.find(None)
    if step_id is None:
        raise CheckpointError(
            f"{path} holds no checkpoint: give a run directory, its folder checkpoints, or one "
            "committed step in it"
        )
    manifest = directory.manifest(step_id)
    return StepReader(directory.step_path(step_id), manifest, threads=threads)


def is_run(path: Path) -> bool:
    """Whether a folder is the directory of a run."""
    return (path / "checkpoints").is_dir()


def is_step_or_directory(path: Path) -> bool:
    """Whether ``open_step`` is what reads a path."""
    return (path / _MANIFEST).is_file() or is_run(path) or (path / "generations").is_dir()
