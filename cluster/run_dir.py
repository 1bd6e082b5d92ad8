"""The directory of a run: one run at a time, and everything that it writes is below it.

- ``config.yaml``: the resolved configuration of the newest start
- ``events.jsonl``: what happened, one JSON object per line
- ``logs/``: output of every rank, with full traces
- ``lock``: held by every process of a running job on the controller's host
- ``ranks.lock``, ``.token``: for ranks on other nodes, see ``shared_dir.py``
"""

import contextlib
import json
import os
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from everstep.checkpoint.errors import DirectoryInUseError
from everstep.checkpoint.lock import DirectoryLock
from everstep.cluster.errors import RunDirError
from everstep.cluster.local_driver import START_LOG_NAME, rank_log
from everstep.cluster.shared_dir import ENDING_S, wait_for_ranks

LOCK_NAME = "lock"


@dataclass(frozen=True)
class RunDir:
    """A prepared and locked run directory; a context manager that releases the lock."""

    path: Path
    lock: DirectoryLock

    @property
    def logs(self) -> Path:
        """Folder of the ranks' logs."""
        return self.path / "logs"

    @property
    def events(self) -> Path:
        """File of the run's events."""
        return self.path / "events.jsonl"

    @property
    def start_log(self) -> Path:
        """File for what is written before there are ranks."""
        return self.logs / START_LOG_NAME

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
        lock = _lock(run_dir)
        if not wait_for_ranks(run_dir, ENDING_S):
            lock.release()
            holder = "a job whose controller has ended, but ranks of it are still there"
            raise DirectoryInUseError(str(run_dir), holder)
        prepared = RunDir(run_dir, lock)
        prepared.logs.mkdir(exist_ok=True)
        _write_atomically(run_dir / "config.yaml", config_yaml)
    except OSError as error:
        if lock is not None:
            lock.release()
        raise RunDirError(str(run_dir), _why(error)) from error
    return prepared


def _why(error: OSError) -> str:
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{error.filename} is a file"
    return error.strerror or str(error)


def _lock(run_dir: Path) -> DirectoryLock:
    """Lock; ranks of a launcher that was killed get a moment to end (they may be large)."""
    deadline_s = time.monotonic() + ENDING_S
    while True:
        try:
            return DirectoryLock(run_dir, LOCK_NAME)
        except DirectoryInUseError as error:
            if not _holder_is_gone(run_dir / LOCK_NAME):
                raise
            if time.monotonic() > deadline_s:
                holder = f"{error.holder}, has ended, but ranks of it are still there"
                raise DirectoryInUseError(error.directory, holder) from None
        time.sleep(0.05)


def _holder_is_gone(lock_file: Path) -> bool:
    """Whether the process that took the lock was one of this host, and has ended."""
    try:
        holder = json.loads(lock_file.read_text())
        return holder["host"] == socket.gethostname() and not _exists(int(holder["pid"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


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
