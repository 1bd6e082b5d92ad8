"""Local files of packs, whose sizes are known."""

import mmap
import os
from pathlib import Path

from everstep.checkpoint.errors import PackTruncatedError


def map_file(path: Path, size_bytes: int) -> mmap.mmap:
    """Map a file for reading.

    Raises:
        PackTruncatedError: it is missing or has another size.
        OSError: as the file system reports it.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise PackTruncatedError(path, "the file is missing") from None
    try:
        found = os.fstat(fd).st_size
        if found != size_bytes:
            raise PackTruncatedError(path, f"it has {found} bytes, expected {size_bytes}")
        return mmap.mmap(fd, size_bytes, prot=mmap.PROT_READ)
    finally:
        os.close(fd)


def read_file(path: Path, size_bytes: int) -> bytes:
    """All of a small file; raises as ``map_file``."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != size_bytes:
                raise PackTruncatedError(path, f"it has {found} bytes, expected {size_bytes}")
            return file.read(size_bytes)
    except FileNotFoundError:
        raise PackTruncatedError(path, "the file is missing") from None
