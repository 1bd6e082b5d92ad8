"""Files of the checkpoint benchmark: past the page cache, into it, out of it; syncs counted."""

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

BLOCK_BYTES = 16 * 2**20
"""Of raw reads and writes: what everstep's own writer stages."""
_LIBC = ctypes.CDLL(None, use_errno=True)


def page_aligned(size_bytes: int) -> np.ndarray:
    """Zeroed uint8 memory that O_DIRECT accepts, as whole pages, all of them touched."""
    pages = -(-max(size_bytes, 1) // mmap.PAGESIZE)
    private = mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE)
    memory = np.frombuffer(private, np.uint8)
    memory.fill(0)
    return memory


def write_direct(path: Path, data: np.ndarray) -> None:
    """A new durable file with page-aligned bytes, as fast as the disk takes them."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o644)
    try:
        _in_blocks(data, lambda block: os.write(fd, block))
        os.fdatasync(fd)
    finally:
        os.close(fd)


def takes_direct(folder: Path) -> bool:
    """Whether files there can be written past the page cache."""
    probe = folder / "probe"
    try:
        write_direct(probe, page_aligned(1))
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True


def read_direct(path: Path, data: np.ndarray) -> None:
    """Fills page-aligned memory from a file of the same size, past the page cache."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        _in_blocks(data, lambda block: os.readv(fd, [block]))
    finally:
        os.close(fd)


def _in_blocks(data: np.ndarray, move: Callable[[memoryview], int]) -> None:
    with memoryview(data) as view:
        done = 0
        while done < len(view):
            moved = move(view[done : done + BLOCK_BYTES])
            if moved == 0:
                raise OSError(f"a file ended {len(view) - done} bytes early")
            done += moved


def sync_path(path: Path) -> None:
    """Make a file, or the entries of a directory, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def files_of(path: Path) -> Iterator[Path]:
    """All files below a path; the path itself if it is one."""
    return (p for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())


def warm(path: Path) -> None:
    """Bring all files below a path into the page cache."""
    buffer = bytearray(BLOCK_BYTES)
    for file in files_of(path):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def drop(path: Path) -> None:
    """Put all files below a path out of the page cache; they have been synced before."""
    for file in files_of(path):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def resident_share(path: Path) -> float:
    """The share of the pages of all files below a path that are in the page cache."""
    found = total = 0
    for file in files_of(path):
        size = file.stat().st_size
        if size:
            with file.open("rb") as stream:
                pages = np.frombuffer(mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
            marks = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
            address, length = ctypes.c_void_p(pages.ctypes.data), ctypes.c_size_t(size)
            if _LIBC.mincore(address, length, ctypes.c_void_p(marks.ctypes.data)):
                raise OSError(ctypes.get_errno(), "mincore", str(file))
            found, total = found + int((marks & 1).sum()), total + len(marks)
    return found / max(total, 1)


class SyncCounter:
    """Counts calls of ``os.fsync`` and ``os.fdatasync`` in this process from now on."""

    def __init__(self) -> None:
        self.count = 0
        for name in ("fsync", "fdatasync"):
            setattr(os, name, self._counting(getattr(os, name)))

    def _counting(self, call: Callable[[Any], None]) -> Callable[[Any], None]:
        def counted(fd: Any) -> None:
            self.count += 1
            call(fd)

        return counted


def file_system(path: Path) -> str:
    """Type and device of the file system that a path lies on."""
    place, found = path.resolve(), ("", "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        device, mount, kind = line.split()[:3]
        if place.is_relative_to(mount) and len(mount) >= len(found[0]):
            found = (mount, f"{kind} on {device}")
    return found[1]
