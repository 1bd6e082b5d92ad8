"""Writing a large file once, from front to back, past the page cache.

Bytes go through aligned staging buffers into O_DIRECT writes of ``STAGING_BYTES``, or of
``EARLY_BYTES`` and more while there is nothing else for the disk to do; where the file system
refuses O_DIRECT (tmpfs, some network file systems: EINVAL at open or at the first write) the same
file is written buffered and its pages are dropped afterwards. Also the small durable operations of
a commit: exclusive files, links that never replace, directory syncs.

Staging buffers outlive their file: a disk has been seen to take a third longer to write memory that
the process has just been given (a virtual machine, 1 GB). A process keeps ``BUFFERS`` of them.
"""

import errno
import fcntl
import mmap
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

STAGING_BYTES = 16 * 2**20
EARLY_BYTES = 4 * 2**20
BUFFERS = 3
"""One is filled, one is written, and one waits, so that the disk never does."""
ALIGN_BYTES = 4096

ByteArray = npt.NDArray[np.uint8]

_spare: list[ByteArray] = []
"""Buffers of ``STAGING_BYTES`` that no file is using."""


class StreamWriter:
    """A new file that is written front to back; a context manager.

    Fill ``space()`` and call ``advance(n)``, until ``finish()``; leaving the context without
    ``finish()`` closes and deletes the file. A staging buffer goes to the file in a thread while
    others are filled: when it is full, or when the thread is idle and ``EARLY_BYTES`` are there. A
    smaller file needs neither.

    Args:
        path: of the file.
        staging_bytes: size of a buffer.
        buffers: how many there are at most; at least 2.

    Raises:
        FileExistsError: the path exists already.
        OSError: as the file system reports it (ENOSPC, EIO, ...), at a later call at the latest.
    """

    def __init__(
        self, path: Path, staging_bytes: int = STAGING_BYTES, buffers: int = BUFFERS
    ) -> None:
        if staging_bytes <= 0 or staging_bytes % ALIGN_BYTES:
            raise ValueError(f"staging_bytes={staging_bytes} is not a multiple of {ALIGN_BYTES}")
        self._path, self._most_under_way = path, buffers - 1
        self._thread: ThreadPoolExecutor | None = None
        self._under_way: deque[tuple[Future[None], ByteArray]] = deque()
        self._filled = 0
        self._written = 0
        self._finished = False
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self.direct = True
        try:
            self._fd = os.open(path, flags | os.O_DIRECT, 0o644)
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
            path.unlink(missing_ok=True)  # some file systems create the file, then refuse the flag
            self.direct = False
            self._fd = os.open(path, flags, 0o644)
        self._staging = _buffer(staging_bytes)

    def space(self) -> ByteArray:
        """An unfilled part of the staging buffer; never empty."""
        return self._staging[self._filled : self._filled + EARLY_BYTES]

    def advance(self, count: int) -> None:
        """Take over the first ``count`` bytes of ``space()``."""
        self._filled += count
        idle = not self._under_way or self._under_way[-1][0].done()
        if self._filled == len(self._staging) or (idle and self._filled >= EARLY_BYTES):
            self._flush_aside()

    def append(self, data: bytes | ByteArray) -> None:
        """Copy bytes in; for the small parts of a file."""
        view = np.frombuffer(data, dtype=np.uint8) if isinstance(data, bytes) else data
        done = 0
        while done < len(view):
            space = self.space()
            n = min(len(space), len(view) - done)
            space[:n] = view[done : done + n]
            self.advance(n)
            done += n

    def write_from(self, data: ByteArray) -> None:
        """Write bytes from where they are, without staging them, as long as nothing is staged.

        Memory that begins at a page goes past the page cache; other memory is written buffered.

        Args:
            data: whole pages; the last of a file may be cut, and is staged.

        Raises:
            ValueError: a part of a page is staged already.
        """
        if self._filled or self._under_way:
            raise ValueError(f"{self._filled} staged bytes come first: write_from() begins a file")
        whole = len(data) // ALIGN_BYTES * ALIGN_BYTES
        self._write(data[:whole])
        self._written += whole
        if whole < len(data):
            self.append(data[whole:])

    def finish(self) -> int:
        """Write what is left, cut the file to its true size, make it durable; returns the size."""
        size = self._written + self._filled
        padded = -(-self._filled // ALIGN_BYTES) * ALIGN_BYTES
        self._staging[self._filled : padded] = 0
        while self._under_way:
            _release(self._wait())
        self._write(self._staging[:padded])
        os.ftruncate(self._fd, size)
        os.fdatasync(self._fd)
        if not self.direct:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        self._finished = True
        return size

    def _flush_aside(self) -> None:
        """Hand the buffer over to the thread; go on with another one and what is unaligned."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="everstep-write")
        full = len(self._under_way) == self._most_under_way
        following = self._wait() if full else _buffer(len(self._staging))
        tail_bytes = self._filled % ALIGN_BYTES
        ready_bytes = self._filled - tail_bytes
        following[:tail_bytes] = self._staging[ready_bytes : self._filled]
        written = self._thread.submit(self._write, self._staging[:ready_bytes])
        self._under_way.append((written, self._staging))
        self._staging = following
        self._written += ready_bytes
        self._filled = tail_bytes

    def _wait(self) -> ByteArray:
        """The buffer whose write began first, when that is done."""
        written, buffer = self._under_way[0]
        written.result()
        self._under_way.popleft()
        return buffer

    def _write(self, data: ByteArray) -> None:
        done, view = 0, data.data
        while done < len(view):
            try:
                n = os.write(self._fd, view[done:])
            except OSError as e:
                if e.errno != errno.EINVAL or not self.direct:
                    raise
                self._leave_direct()
                continue
            done += n
            if self.direct and n % ALIGN_BYTES:  # a short write left the offset unaligned
                self._leave_direct()

    def _leave_direct(self) -> None:
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self.direct = False

    def __enter__(self) -> "StreamWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is not None:
            # before the descriptor can become another file's, and buffers its
            self._thread.shutdown(cancel_futures=True)
        for _, buffer in self._under_way:
            _release(buffer)
        _release(self._staging)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(self._path)
        try:
            os.close(self._fd)
        finally:
            if not self._finished:
                self._path.unlink(missing_ok=True)


def _buffer(size_bytes: int) -> ByteArray:
    """Memory that begins at a page, as O_DIRECT needs; a forked process gets a copy."""
    if size_bytes == STAGING_BYTES:
        with suppress(IndexError):
            return _spare.pop()
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)


def _release(buffer: ByteArray) -> None:
    """Keep a buffer for another file."""
    if len(buffer) == STAGING_BYTES and len(_spare) < BUFFERS:
        _spare.append(buffer)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of calls on a descriptor do not say which file it was."""
    try:
        yield
    except OSError as e:
        e.filename = e.filename or str(path)
        raise


def sync_directory(path: Path) -> None:
    """Make the entries of a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with _naming(path):
            os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: Path) -> None:
    """Make a directory and its ancestors, durably; it may be there already."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


def write_durable(path: Path, data: bytes) -> None:
    """Create a new file with these bytes and make them durable (its directory entry is not yet).

    Raises:
        FileExistsError: the path exists already.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with _naming(path):
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def publish(path: Path, data: bytes, temporary: Path, *, settle: bool = True) -> None:
    """Make a file appear whole or not at all, its bytes durable, never replacing one.

    The bytes go to ``temporary`` (same directory, nobody else's), are synced, and are linked to
    ``path``.

    Args:
        path: the file to create.
        data: all of it.
        temporary: name to use meanwhile.
        settle: whether its name is to be durable, too, when this returns.

    Raises:
        FileExistsError: ``path`` exists.
    """
    temporary.unlink(missing_ok=True)
    write_durable(temporary, data)
    try:
        os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if settle:
        sync_directory(path.parent)
