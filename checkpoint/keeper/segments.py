"""Memory that outlives its users: sealed memfds, and how many of them this host can bear."""

import fcntl
import mmap
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.errors import SlotMemoryError
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
    return int(_SHARE_OF_MEMORY * available_bytes())


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that is to be had: of the host, and of the control groups of this process.

    Args:
        root: below which proc/ and sys/ are looked for.
    """
    meminfo = (root / "proc/meminfo").read_text()
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo, re.MULTILINE)
    left = [int(match[1]) * 1024] if match else [2**62]
    try:
        groups = (root / "proc/self/cgroup").read_text()
    except OSError:
        groups = ""
    for line in groups.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = Path(path.lstrip("/"))
        left += (_left_in(top / folder, *names) for folder in (group, *group.parents))
    return max(0, min(left))


def _left_in(folder: Path, limit_name: str, usage_name: str) -> int:
    """Bytes that a control group has left; the cache of files counts as left."""
    try:
        limit = int((folder / limit_name).read_text())  # "max" is none
        usage = int((folder / usage_name).read_text())
        stat = (folder / "memory.stat").read_text()
    except (OSError, ValueError):
        return 2**62
    found = re.findall(r"^(\w*inactive_file) (\d+)$", stat, re.MULTILINE)
    caches = {name: int(n_bytes) for name, n_bytes in found}
    with_groups_below = caches.get("total_inactive_file")  # the first version tells both
    own = caches.get("inactive_file", 0)
    return limit - usage + (own if with_groups_below is None else with_groups_below)
