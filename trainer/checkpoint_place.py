"""Where a run keeps its checkpoints, and what the keepers of their snapshots are called."""

import hashlib
import os
from pathlib import Path

from everstep.checkpoint.stores import is_url


def checkpoint_place(run_dir: Path, directory: str | None) -> Path | str:
    """Where a run keeps its checkpoints, from ``checkpoint.directory``: an absolute path, or a URL.

    Keepers write there too, and have another working directory.
    """
    if directory is not None and is_url(directory):
        return directory
    return Path(os.path.abspath(run_dir / (directory or "checkpoints")))


def keeper_job(place: Path | str) -> str:
    """Name of the keeper for snapshots of the checkpoints in ``place``, the same at every start."""
    return f"run-{hashlib.blake2b(str(place).encode(), digest_size=6).hexdigest()}"
