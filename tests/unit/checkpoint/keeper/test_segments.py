"""Memory of slots, and how much of it there is."""

import os
from pathlib import Path

import numpy as np
import pytest

from everstep.checkpoint.host_memory import memory_room
from everstep.checkpoint.keeper import segments


def test_a_slot_has_pages_and_keeps_its_size() -> None:
    fd = segments.create(8192)
    try:
        segments.prefault(fd, 8192)
        assert os.fstat(fd).st_blocks * 512 == 8192
        for size_bytes in (4096, 16384):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size_bytes)
        assert segments.check(fd) == 8192
        slot = segments.map_slot(fd, writable=True, populate=True)
        slot[:] = np.uint8(9)
        look = segments.read_only(fd)
        seen = segments.map_slot(look, writable=False)
        with pytest.raises(PermissionError):
            segments.map_slot(look, writable=True)
        os.close(look)
        assert int(seen.sum()) == 9 * 8192
        with pytest.raises(ValueError, match="read-only"):
            seen[0] = 1
    finally:
        os.close(fd)


def test_prefaulting_ends_early_where_nobody_wants_it() -> None:
    fd = segments.create(8192)
    segments.prefault(fd, 8192, wanted=lambda: False)
    assert os.fstat(fd).st_blocks == 0
    os.close(fd)


def test_what_is_no_slot(tmp_path: Path) -> None:
    loose = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(loose, 4096)
    with pytest.raises(ValueError, match="its size is not fixed"):
        segments.check(loose)
    os.close(loose)
    with open(tmp_path / "file", "w") as file, pytest.raises(ValueError, match="no memfd"):
        segments.check(file.fileno())


def _host(root: Path, files: dict[str, str]) -> Path:
    """A host with 1000 KiB available."""
    files = {
        "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    1000 kB\n",
        **files,
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def _room(root: Path, cgroup: list[str], files: dict[str, str]) -> int:
    meminfo = _host(root, files) / "proc/meminfo"
    return memory_room(meminfo, [root / folder for folder in cgroup]).least_bytes


def test_memory_of_a_host_without_limits(tmp_path: Path) -> None:
    assert _room(tmp_path, [], {}) == 1000 * 1024


def test_memory_of_the_second_version_of_control_groups(tmp_path: Path) -> None:
    top = "sys/fs/cgroup/job"
    files = {
        f"{top}/memory.max": "500000\n",
        f"{top}/memory.current": "300000\n",
        f"{top}/memory.stat": "anon 1\ninactive_file 50000\n",
        f"{top}/rank/memory.max": "max\n",
        f"{top}/rank/memory.current": "300000\n",
        f"{top}/rank/memory.stat": "inactive_file 0\n",
    }
    assert _room(tmp_path, [f"{top}/rank", top], files) == 250000


def test_memory_of_the_first_version_of_control_groups(tmp_path: Path) -> None:
    top = "sys/fs/cgroup/memory/job"
    files = {
        f"{top}/memory.limit_in_bytes": "400000\n",
        f"{top}/memory.usage_in_bytes": "450000\n",
        f"{top}/memory.stat": "inactive_file 1\ntotal_inactive_file 60000\n",
    }
    assert _room(tmp_path, [top], files) == 10000


def test_this_host_has_memory() -> None:
    assert 0 < segments.default_budget_bytes() < memory_room().least_bytes * 2
