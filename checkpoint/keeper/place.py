"""Where the keeper of a job is found: a directory that only its user may enter.

::

    PLACE/JOB/keeper.sock   its socket; there while it lives
    PLACE/JOB/token         32 random bytes that the keepers of other nodes are asked to know
    PLACE/JOB/lock          held (flock) while a keeper of the job, or its supervisor, lives
    PLACE/JOB/keeper.log    what it has to say

``PLACE`` is by default ``$XDG_RUNTIME_DIR/everstep``, or ``/tmp/everstep-UID`` where there is none.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import socket
import stat
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from everstep.checkpoint.errors import KeeperError

TOKEN_BYTES = 32
_JOB = re.compile(r"[A-Za-z0-9._-]{1,80}")
_CREDENTIALS = struct.Struct("3i")
_SOCKET = "keeper.sock"
_LOCK_POLL_S = 0.003


def default_place(environment: Mapping[str, str] = os.environ) -> Path:
    """Where keepers are looked for when nothing is said."""
    runtime = environment.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isabs(runtime) and os.path.isdir(runtime):
        return Path(runtime) / "everstep"
    return Path(f"/tmp/everstep-{os.geteuid()}")


def check_job(job: str) -> str:
    """The name of a job, checked. Raises KeeperError."""
    if not _JOB.fullmatch(job) or job in (".", ".."):
        raise KeeperError(
            f"{job!r} cannot name a job: use 1 to 80 letters, digits, '.', '_' and '-'"
        )
    return job


@dataclass(frozen=True)
class KeeperPlace:
    """The directory of one job's keeper."""

    root: Path
    job: str

    @classmethod
    def of(cls, job: str, place: Path | None = None) -> "KeeperPlace":
        """The place of a job. Raises KeeperError where its name is none."""
        return cls(Path(os.path.abspath(place or default_place())), check_job(job))

    @property
    def path(self) -> Path:
        """Of everything of this keeper."""
        return self.root / self.job

    @property
    def log(self) -> Path:
        """What the keeper has to say."""
        return self.path / "keeper.log"

    def make(self) -> None:
        """Make the directories, readable by their user only.

        Raises:
            KeeperError: they are there and belong to, or can be entered by, somebody else.
        """
        for folder in (self.root, self.path):
            with contextlib.suppress(FileExistsError):
                folder.mkdir(0o700, parents=folder == self.root)
        self.check()

    def check(self) -> None:
        """Raise KeeperError unless only this user may enter; FileNotFoundError without a place."""
        for folder in (self.root, self.path):
            found = os.lstat(folder)
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                raise KeeperError(
                    f"{folder} is not a directory of user {os.geteuid()}: name another place with "
                    "--place, on which nobody else can write"
                )
            if found.st_mode & 0o077:
                raise KeeperError(
                    f"{folder} can be entered by others (mode {found.st_mode & 0o777:o}): "
                    f"chmod 700 {folder}"
                )

    def lock(self, *, wait_s: float = 0.0) -> int | None:
        """A descriptor that holds the lock of the place; None while somebody else has it.

        Args:
            wait_s: how long to wait for it; those who only look have it for a moment, too.
        """
        deadline_s = time.monotonic() + wait_s
        fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return fd
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    os.close(fd)
                    return None
            time.sleep(_LOCK_POLL_S)

    def is_held(self) -> bool:
        """True while a keeper, or its supervisor, lives."""
        try:
            fd = self.lock()
        except FileNotFoundError:
            return False
        if fd is not None:
            os.close(fd)
        return fd is None

    def listen(self) -> socket.socket:
        """A socket that clients can connect to; what was left of another one is removed."""
        with self._address() as address:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(address)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(address)
        listener.listen(256)
        return listener

    def connect(self) -> socket.socket:
        """A connection to the keeper.

        Raises:
            KeeperError: the place is not safe, or somebody else listens there.
            OSError: there is no keeper.
        """
        self.check()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with self._address() as address:
                connection.connect(address)
            if peer_of(connection)[1] != os.geteuid():
                raise KeeperError(
                    f"the keeper in {self.path} belongs to user {peer_of(connection)[1]}, not "
                    f"{os.geteuid()}: start one of your own in another --place"
                )
        except BaseException:
            connection.close()
            raise
        return connection

    def make_token(self) -> bytes:
        """The token of the job, made where there is none."""
        path = self.path / "token"
        with contextlib.suppress(FileNotFoundError):
            return self.token()
        fresh = self.path / f".token-{os.getpid()}"
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(secrets.token_bytes(TOKEN_BYTES))
        os.rename(fresh, path)
        return self.token()

    def token(self) -> bytes:
        """The token of the job.

        Raises:
            KeeperError: it is not one, or others can read it.
            OSError: it cannot be read.
        """
        path = self.path / "token"
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with open(fd, "rb") as file:
            found = os.fstat(fd)
            token = file.read(TOKEN_BYTES + 1)
        private = found.st_uid == os.geteuid() and not found.st_mode & 0o077
        if len(token) != TOKEN_BYTES or not private:
            raise KeeperError(
                f"{path} is not a token of {TOKEN_BYTES} bytes that only its user can read: delete "
                "it, and start the keeper again"
            )
        return token

    def clear(self) -> None:
        """Remove what tells of a keeper that is no more."""
        for name in (_SOCKET, "token"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path / name)

    @contextlib.contextmanager
    def _address(self) -> Iterator[str]:
        # through a descriptor, since the address of a socket has at most 107 bytes
        folder = os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield f"/proc/self/fd/{folder}/{_SOCKET}"
        finally:
            os.close(folder)


def jobs_in(place: Path | None = None) -> list[str]:
    """The jobs that have, or had, a keeper in a place."""
    root = place or default_place()
    try:
        return sorted(e.name for e in os.scandir(root) if e.is_dir() and _JOB.fullmatch(e.name))
    except FileNotFoundError:
        return []


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """(process, user) at the other side; process 0 where it is not to be seen from here."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return pid, uid


def is_absence(error: OSError) -> bool:
    """True for what connecting raises where no keeper is."""
    return error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR)
