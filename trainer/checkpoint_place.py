"""Where a run keeps its checkpoints, and what the keepers of their snapshots are called."""

import hashlib
import os
from pathlib import Path

from everstep.checkpoint.stores import is_url


def checkpoint_place(run_dir: Path, directory: str | None) -> Path | str:
    """Where a run keeps its checkpoints, from ``checkpoint.directory``."""
    if directory is None:
        return run_dir / "checkpoints"
    return directory if is_url(directory) else run_dir / directory


def keeper_job(place: Path | str) -> str:
    """Name of the keeper for snapshots of the checkpoints in ``place``, the same at every start."""
    where = place if isinstance(place, str) else os.path.abspath(place)
    return f"run-{hashlib.blake2b(where.encode(), digest_size=6).hexdigest()}"
