"""How much memory a process of this host may still take: what is free, and its control group."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from everstep.checkpoint.errors import SlotMemoryError

_ROOT = Path("/sys/fs/cgroup")
_FILES = (  # limit, use, and what of the use the kernel gives back: versions 2 and 1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(frozen=True)
class MemoryRoom:
    """Bytes that can be had."""

    available_bytes: int
    """Of the host, without swapping."""
    limit_bytes: int | None
    """What the control groups leave; None: they set no limit."""

    @property
    def least_bytes(self) -> int:
        """What neither the host nor a control group refuses."""
        bounds = [self.available_bytes] + ([] if self.limit_bytes is None else [self.limit_bytes])
        return max(0, min(bounds))


def memory_room(
    meminfo: Path = Path("/proc/meminfo"), folders: Iterable[Path] | None = None
) -> MemoryRoom:
    """What this process may still take.

    Args:
        meminfo: the kernel's account of the host.
        folders: of control groups; None: this process's, and those around it.
    """
    groups = cgroup_folders("memory") if folders is None else folders
    left = [room for room in map(_left, groups) if room is not None]
    available = parse_meminfo(text_of(meminfo)).get("MemAvailable", 0)
    return MemoryRoom(available, min(left, default=None))


def least_room_bytes() -> int:
    """Bytes that this process may still take now."""
    return memory_room().least_bytes


def memory_check(needed: int, available: int, limit: int | None, budget: int | None) -> str | None:
    """Why memory for snapshots cannot be had, as a sentence; None: it can (pure).

    Args:
        needed: bytes, of all slots.
        available: bytes that the host can give without swapping.
        limit: bytes that the control group (of a container, a batch job) still allows.
        budget: bytes that the user allows for snapshots.
    """
    bounds = [
        (budget, "the budget for snapshots", "raise the budget"),
        (limit, "what the control group of this process still allows", "raise its memory limit"),
        (available, "what this host has available", "free memory"),
    ]
    for bound, what, way_out in bounds:
        if bound is not None and needed > bound:
            return (
                f"snapshots need {_gib(needed)} of memory, which is more than {what} "
                f"({_gib(bound)}): {way_out}, use more hosts or fewer slots, or save without "
                "snapshots"
            )
    return None


def check_memory(needed: int, budget: int | None, held: int = 0) -> None:
    """Refuse to take memory that is not there.

    Args:
        needed: bytes to take.
        budget: bytes that snapshots may have altogether; None: as much as there is.
        held: bytes that they have already.

    Raises:
        SlotMemoryError: see ``memory_check``.
    """
    room = memory_room()
    left = None if budget is None else max(0, budget - held)
    if problem := memory_check(needed, room.available_bytes, room.limit_bytes, left):
        raise SlotMemoryError(problem)


def parse_meminfo(text: str) -> dict[str, int]:
    """/proc/meminfo as bytes."""
    found = re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)
    return {name: int(kib) * 1024 for name, kib in found}


def cgroup_folders(controller: str) -> list[Path]:
    """Folders of this process's control group and those around it, for versions 1 and 2."""
    folders = [_ROOT, _ROOT / controller]
    for line in text_of(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", controller) or controller in controllers.split(","):
            base = _ROOT / controller if controllers else _ROOT
            inside = Path(path.lstrip("/"))
            folders += [base / part for part in (inside, *inside.parents)]
    return list(dict.fromkeys(folders))


def text_of(path: Path) -> str:
    """Contents of a small system file; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _left(folder: Path) -> int | None:
    for limit_name, use_name, reclaimable in _FILES:
        limit, use = (text_of(folder / name).strip() for name in (limit_name, use_name))
        if limit.isdigit() and use.isdigit():
            found = re.search(rf"^{reclaimable} (\d+)$", text_of(folder / "memory.stat"), re.M)
            return max(0, int(limit) - int(use) + (int(found[1]) if found else 0))
    return None


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"
