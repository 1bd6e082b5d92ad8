"""Memory that outlives its users: sealed memfds, and how many of them this host can bear."""

import fcntl
import mmap
import os
from collections.abc import Callable

import numpy as np

from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.errors import SlotMemoryError
from everstep.checkpoint.host_memory import least_room_bytes
from everstep.checkpoint.snapshots.slot_format import PAGE_BYTES

NAME = "everstep-slot"
"""How /proc shows a slot: ``/memfd:everstep-slot (deleted)``."""
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_FAULT_BYTES = 2**28
_SHARE_OF_MEMORY = 0.8


def create(size_bytes: int) -> int:
    """A descriptor of new memory, which nobody can shrink or let grow; without pages yet."""
    fd = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def prefault(fd: int, size_bytes: int, *, wanted: Callable[[], bool] = lambda: True) -> None:
    """Back memory by pages; blocks, without the interpreter's lock; ends early if not ``wanted``.

    Raises:
        SlotMemoryError: there are not enough pages.
    """
    for start in range(0, size_bytes, _FAULT_BYTES):
        if not wanted():
            return
        try:
            os.posix_fallocate(fd, start, min(_FAULT_BYTES, size_bytes - start))
        except OSError as error:
            raise SlotMemoryError(
                f"a slot of {size_bytes} bytes cannot be backed by memory ({error.strerror}): keep "
                "fewer snapshots in memory, or give the job more"
            ) from None


def check(fd: int) -> int:
    """Size of a descriptor that somebody offers as a slot, in bytes.

    Raises:
        ValueError: it is no memory whose size is fixed.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise ValueError("a descriptor that was offered is no memfd") from None
    size_bytes = os.fstat(fd).st_size
    if seals & _SEALS != _SEALS or size_bytes < PAGE_BYTES or size_bytes % PAGE_BYTES:
        raise ValueError("memory that was offered is no slot: its size is not fixed")
    return size_bytes


def map_slot(fd: int, *, writable: bool, populate: bool = False) -> ByteArray:
    """The bytes of a slot; they stay mapped as long as the array, or a view of it, is there."""
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if populate else 0)
    mapped = mmap.mmap(fd, os.fstat(fd).st_size, flags=flags, prot=protection)
    return np.frombuffer(mapped, np.uint8)


def read_only(fd: int) -> int:
    """A new descriptor of the same memory through which nothing can be written."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def default_budget_bytes() -> int:
    """80 % of the memory that is to be had now."""
    return int(_SHARE_OF_MEMORY * least_room_bytes())
