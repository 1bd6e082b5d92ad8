"""One writer per directory: an advisory lock that the kernel drops when its holder dies."""

import fcntl
import json
import os
import socket
import time
import weakref
from pathlib import Path
from types import TracebackType

from everstep.checkpoint.direct_io import make_directory
from everstep.checkpoint.errors import DirectoryInUseError

_HELD: "weakref.WeakSet[DirectoryLock]" = weakref.WeakSet()


class DirectoryLock:
    """Holds ``directory/name`` locked (flock); a context manager.

    The file says who holds it, for the error message of the next one; it stays when the lock is
    released, since deleting a lock file is a race. A forked child lets go at once: it would keep
    the directory locked when its parent has died.

    Raises:
        DirectoryInUseError: another process (or another lock of this one) holds it.
    """

    def __init__(self, directory: Path, name: str = "lock") -> None:
        self._directory = directory
        make_directory(directory)
        self._fd = os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _describe(os.pread(self._fd, 4096, 0))
            os.close(self._fd)
            raise DirectoryInUseError(str(directory), holder) from None
        except OSError:
            os.close(self._fd)
            raise
        self._sign()

    @classmethod
    def taken_over(cls, directory: Path, fd: int) -> "DirectoryLock":
        """The lock that a descriptor holds already; it is this object's from now on."""
        lock = cls.__new__(cls)
        lock._directory, lock._fd = directory, fd
        lock._sign()
        return lock

    def share_with(self, keeper: str) -> None:
        """Name a keeper that holds the lock, too, for who finds the directory locked."""
        self._sign(keeper=keeper)

    def _sign(self, **more: str) -> None:
        mine = {"pid": os.getpid(), "host": socket.gethostname(), "since_s": time.time(), **more}
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps(mine).encode(), 0)
        _HELD.add(self)

    def fileno(self) -> int:
        """The descriptor that holds the lock; processes that inherit it hold the lock, too."""
        return self._fd

    def release(self) -> None:
        """Let the next one in; may be called twice."""
        if self._fd >= 0:
            _HELD.discard(self)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "DirectoryLock":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def _let_go_in_child() -> None:
    for lock in list(_HELD):
        lock.release()


os.register_at_fork(after_in_child=_let_go_in_child)


def _describe(content: bytes) -> str:
    try:
        holder = json.loads(content)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since_s"]))
        who = f"process {holder['pid']} on {holder['host']}, since {since}"
        if "keeper" in holder:
            who += f", or its keeper in {holder['keeper']}, which `everstep keeper stop` ends"
        return who
    except (ValueError, KeyError, TypeError):
        return "an unknown process"
