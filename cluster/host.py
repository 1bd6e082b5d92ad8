"""What this host offers to ranks, and what its kernel does for their processes."""

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import struct
import sys
from collections.abc import Collection
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_SIOCGIFADDR = 0x8915
_END_ROUNDS = 100


def available_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with contextlib.suppress(OSError):
        cores = min(cores, quota_cores(Path("/sys/fs/cgroup/cpu.max").read_text(), cores))
    return max(1, cores)


def quota_cores(cpu_max: str, cores: int) -> int:
    """Whole cores that a cgroup's ``cpu.max`` ('QUOTA PERIOD' in microseconds) leaves of them."""
    quota, _, period = cpu_max.strip().partition(" ")
    if not quota.isdigit() or not period.isdigit():
        return cores
    return max(1, min(cores, int(quota) // int(period)))


def threads_per_rank(threads: int | str, cores: int, ranks: int) -> int:
    """CPU threads for each of ``ranks`` on a host; 'auto' shares its cores among them."""
    return threads if isinstance(threads, int) else max(1, cores // ranks)


def die_with_parent(parent_pid: int, signum: int = signal.SIGKILL) -> None:
    """Have the kernel send ``signum`` to this process when its parent ends (Linux only).

    The parent is the *thread* that forked this process. Where it is gone already, this process
    ends here.
    """
    _prctl(_PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent_pid:
        os._exit(1)


def outlive_parent() -> None:
    """Take ``die_with_parent`` back."""
    _prctl(_PR_SET_PDEATHSIG, 0)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends (Linux only)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def children_of(pid: int) -> list[int]:
    """Processes whose parent is ``pid``; empty without /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid:
                found.append(int(entry.name))
    return found


def end_descendants(keep: Collection[int] = ()) -> None:
    """Kill children but ``keep`` until there are none; needs ``adopt_orphans`` for theirs."""
    for _ in range(_END_ROUNDS):
        children = [pid for pid in children_of(os.getpid()) if pid not in keep]
        if not children:
            return
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def prefer_for_oom_kill() -> None:
    """Make the kernel's out-of-memory killer take this process before those that report on it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


def loopback_interface() -> str | None:
    """Name of the network interface that never leaves this host."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), None)


def interface_of(address: str) -> str | None:
    """Name of the network interface that has an IPv4 address; None where none is found."""
    names = (name for _, name in socket.if_nameindex())
    return next((name for name in names if address_of(name) == address), None)


def address_of(interface: str) -> str | None:
    """IPv4 address of a network interface; None where it has none, or is not there."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        packed = struct.pack("256s", interface.encode()[:15])
        answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, packed)
        return socket.inet_ntoa(answer[20:24])
    return None


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
