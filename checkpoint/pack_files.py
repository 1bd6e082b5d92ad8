"""The bytes of packs, whose sizes are known: local files, and memory that is there already."""

import errno
import mmap
import os
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.errors import PackTruncatedError
from everstep.checkpoint.kernels import pages_missing, populate_pages

AHEAD = 4
"""Ranges that are fetched ahead of the one in use; a walk has ranges of some 8 MiB."""

Range = tuple[int, int]
"""Begin and end in a file."""


class PackFile(Protocol):
    """The bytes of a pack, for reading."""

    @property
    def data(self) -> ByteArray:
        """All of them; what is read is fetched before."""
        ...

    def fetch(self, begin: int, end: int) -> None:
        """Bring a range into memory; raises OSError where that is impossible."""
        ...

    def fetch_all(self, ranges: Iterable[Range]) -> Generator[None, None, None]:
        """Fetch one range after the other."""
        ...

    def close(self) -> None:
        """Let go of the bytes."""
        ...


class MemoryFile:
    """A pack that is in memory; whoever makes it sees to it that it stays there.

    Raises:
        PackTruncatedError: it has another size.
    """

    def __init__(self, where: str, data: ByteArray, size_bytes: int) -> None:
        if len(data) != size_bytes:
            raise PackTruncatedError(where, f"it has {len(data)} bytes, expected {size_bytes}")
        self.data = data
        """All bytes of the pack."""

    def fetch(self, begin: int, end: int) -> None:
        """Nothing is to be done."""

    def fetch_all(self, ranges: Iterable[Range]) -> Generator[None, None, None]:
        """Nothing is to be done, for each range."""
        for _ in ranges:
            yield

    def close(self) -> None:
        """Let go of the memory."""
        del self.data


class MappedFile:
    """A file mapped for reading.

    A plain read of a mapped page that the device cannot deliver is a SIGBUS: whatever is read
    through ``data`` is fetched before, by ``fetch`` or ``fetch_all``, where that is an OSError.

    Raises:
        PackTruncatedError: it is missing or has another size.
        OSError: as the file system reports it.
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise PackTruncatedError(path, "the file is missing") from None
        try:
            found = os.fstat(fd)
            if found.st_size != size_bytes:
                raise PackTruncatedError(
                    path, f"it has {found.st_size} bytes, expected {size_bytes}"
                )
            self._map = mmap.mmap(fd, size_bytes, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        # To others the kernel says of every page that it is in memory (mincore, Linux 5.2).
        owns = found.st_uid == os.geteuid()
        self._told = owns or os.access(path, os.W_OK, effective_ids=True)
        self.data: ByteArray = np.frombuffer(self._map, dtype=np.uint8)
        """All bytes of the file."""

    def fetch(self, begin: int, end: int) -> None:
        """Bring a range into memory; raises OSError with EIO where that is impossible."""
        error = populate_pages(self.data[begin:end], told=self._told)
        if error not in (0, errno.EINVAL):  # EINVAL: Linux before 5.14, which reads as it goes
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self._path))

    def fetch_all(self, ranges: Iterable[Range]) -> Generator[None, None, None]:
        """Fetch one range after the other; a thread fetches the next ones if they are on disk.

        It is one thread only, and the kernel is not asked to read ahead by itself
        (MADV_WILLNEED): it then sees one stream, which it reads in large requests into large
        folios of the page cache. Small ones make this load and the next ones slower.
        """
        waiting: deque[tuple[Range, Future[None] | None]] = deque()
        todo = iter(ranges)
        thread: ThreadPoolExecutor | None = None
        try:
            while True:
                while len(waiting) <= AHEAD and (ahead := next(todo, None)) is not None:
                    fetching = None
                    if pages_missing(self.data[ahead[0] : ahead[1]]):
                        thread = thread or ThreadPoolExecutor(1, "everstep-read-ahead")
                        fetching = thread.submit(self.fetch, *ahead)
                    waiting.append((ahead, fetching))
                if not waiting:
                    return
                (begin, end), fetching = waiting.popleft()
                if fetching is None:
                    self.fetch(begin, end)
                else:
                    fetching.result()
                yield
        finally:
            if thread is not None:
                thread.shutdown(wait=True, cancel_futures=True)

    def close(self) -> None:
        """Let go of the file."""
        del self.data, self._map


def read_file(path: Path, size_bytes: int) -> bytes:
    """All of a small file; raises as ``MappedFile``."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != size_bytes:
                raise PackTruncatedError(path, f"it has {found} bytes, expected {size_bytes}")
            return file.read(size_bytes)
    except FileNotFoundError:
        raise PackTruncatedError(path, "the file is missing") from None
