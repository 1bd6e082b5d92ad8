"""The directory of a run: one run at a time, and everything that it writes is below it.

- ``config.yaml``: the resolved configuration of the newest start
- ``events.jsonl``: what happened, one JSON object per line
- ``logs/``: output of every rank, with full traces
- ``lock``: held by every process of a running job
"""

import contextlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from everstep.checkpoint.lock import DirectoryLock
from everstep.cluster.errors import RunDirError
from everstep.cluster.local_driver import rank_log

LOCK_NAME = "lock"


class RunLock(DirectoryLock):
    """The lock of a run directory; processes that inherit its descriptor hold it too."""

    def fileno(self) -> int:
        """The descriptor that holds the lock."""
        return self._fd


@dataclass(frozen=True)
class RunDir:
    """A prepared and locked run directory; a context manager that releases the lock."""

    path: Path
    lock: RunLock

    @property
    def logs(self) -> Path:
        """Folder of the ranks' logs."""
        return self.path / "logs"

    @property
    def events(self) -> Path:
        """File of the run's events."""
        return self.path / "events.jsonl"

    def rank_log(self, rank: int) -> Path:
        """Log of a rank."""
        return rank_log(self.logs, rank)

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.lock.release()


def prepare_run_dir(run_dir: Path, config_yaml: str) -> RunDir:
    """Create and lock a run directory, and write the configuration into it.

    Raises:
        DirectoryInUseError: another run holds it.
        RunDirError: it cannot be created, locked or written.
    """
    lock = None
    try:
        lock = RunLock(run_dir, LOCK_NAME)
        prepared = RunDir(run_dir, lock)
        prepared.logs.mkdir(exist_ok=True)
        _write_atomically(run_dir / "config.yaml", config_yaml)
    except OSError as error:
        if lock is not None:
            lock.release()
        raise RunDirError(str(run_dir), error.strerror or str(error)) from error
    return prepared


def _write_atomically(path: Path, text: str) -> None:
    """Readers see the old file or the new one, whole, whatever happens meanwhile."""
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise
