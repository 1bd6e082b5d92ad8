"""What ranks on other nodes know about a run directory that their controller has prepared.

- ``.token``: written by the controller; a rank that reads the same bytes sees the same directory,
  and belongs to the job that runs there now,
- ``ranks.lock``: held (shared) by every rank, so that the next job waits for the last of them.
"""

import contextlib
import fcntl
import os
import time
import uuid
from pathlib import Path

from everstep.cluster.errors import LaunchError

TOKEN_NAME = ".token"
RANKS_LOCK_NAME = "ranks.lock"
ENDING_S = 20.0
"""How long is waited for ranks whose controller has ended, or that were killed."""
SEEN_WITHIN_S = 10.0
"""Network file systems may show a new file only after a while."""


def write_token(run_dir: Path) -> str:
    """Mark the directory as that of the job that begins now."""
    token = uuid.uuid4().hex
    (run_dir / TOKEN_NAME).write_text(token)
    return token


def remove_token(run_dir: Path) -> None:
    """The job has ended; ranks of it that come late do not begin any more."""
    with contextlib.suppress(OSError):
        (run_dir / TOKEN_NAME).unlink()


def check_token(run_dir: Path, token: str, node: str, within_s: float | None = None) -> None:
    """Raise LaunchError unless this node sees the directory that the controller has marked."""
    deadline_s = time.monotonic() + (SEEN_WITHIN_S if within_s is None else within_s)
    while True:
        try:
            found = (run_dir / TOKEN_NAME).read_text()
        except OSError:
            found = ""
        if found == token:
            return
        if time.monotonic() >= deadline_s:
            raise LaunchError(
                f"node {node} does not see the run directory {run_dir} of this command: choose a "
                "--run-dir on a file system that all nodes share"
            )
        time.sleep(0.2)


def hold_for_rank(run_dir: Path) -> int:
    """A descriptor that keeps the directory from the next job as long as it is open."""
    fd = os.open(run_dir / RANKS_LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(fd, fcntl.LOCK_SH)
    return fd


def wait_for_ranks(run_dir: Path, timeout_s: float) -> bool:
    """Wait until no rank of an earlier job holds the directory; False = some still do."""
    try:
        fd = os.open(run_dir / RANKS_LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() >= deadline_s:
                    return False
            except OSError:
                return True  # a file system without locks
            time.sleep(0.05)
    finally:
        os.close(fd)
