"""CPU seconds and memory of processes, and where the main thread's time goes."""

import ctypes
import os
import resource
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_LIBC = ctypes.CDLL(None)
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def own_cpu_s() -> float:
    """CPU time of this process with all its threads, ended ones too."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def cpu_s_of(pids: Iterable[int]) -> float:
    """CPU time of other processes, to the kernel's tick."""
    total = 0.0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) * _TICK_S  # utime, stime
    return total


def begin_peak() -> None:
    """Give free memory back to the system, and let ``peak`` start from what is held now."""
    _LIBC.malloc_trim(ctypes.c_size_t(0))
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> tuple[int, int]:
    """Bytes held at most since ``begin_peak``; bytes of shared memory among those held now."""
    sizes = _kilobytes(Path("/proc/self/status"))
    return sizes["VmHWM"], sizes["RssShmem"]


def shared_bytes() -> int:
    """Shared memory of the whole machine: files in tmpfs, memfds, shared mappings."""
    return _kilobytes(Path("/proc/meminfo"))["Shmem"]


def private_bytes_of(pids: Iterable[int]) -> int:
    """Memory that other processes hold now and share with none."""
    return sum(_kilobytes(Path(f"/proc/{pid}/status"))["RssAnon"] for pid in pids)


def _kilobytes(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text().splitlines())
    return {f[0].rstrip(":"): int(f[1]) * 1024 for f in lines if f[-1] == "kB"}


@dataclass
class MainThread:
    """What snapshots take of the main thread, one entry per step, in seconds."""

    save_s: list[float] = field(default_factory=list)
    save_cpu_s: list[float] = field(default_factory=list)
    fence_s: list[float] = field(default_factory=list)
    fence_cpu_s: list[float] = field(default_factory=list)
    _fence_begun: tuple[float, float] = (0.0, 0.0)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around the call that asks for a snapshot."""
        began_s, cpu_s = time.monotonic(), time.thread_time()
        yield
        self.save_s.append(time.monotonic() - began_s)
        self.save_cpu_s.append(time.thread_time() - cpu_s)

    def fence_begins(self) -> None:
        """Before the first hook that may hold up the update."""
        self._fence_begun = time.monotonic(), time.thread_time()

    def fence_ends(self) -> None:
        """After the last one."""
        began_s, cpu_s = self._fence_begun
        self.fence_s.append(time.monotonic() - began_s)
        self.fence_cpu_s.append(time.thread_time() - cpu_s)

    def last(self, steps: int) -> dict[str, list[float]]:
        """The entries of the last steps."""
        return {
            name: getattr(self, name)[-steps:]
            for name in ("save_s", "save_cpu_s", "fence_s", "fence_cpu_s")
        }
