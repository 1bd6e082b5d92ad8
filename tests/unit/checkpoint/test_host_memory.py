"""What memory can be had, and what is said where it cannot."""

from pathlib import Path

import pytest

from everstep.checkpoint.errors import SlotMemoryError
from everstep.checkpoint.host_memory import (
    MemoryRoom,
    check_memory,
    memory_check,
    memory_room,
    parse_meminfo,
)

GIB = 2**30


def test_meminfo() -> None:
    text = "MemTotal:       24684084 kB\nMemAvailable:    1024 kB\nHugePages_Total:       0\n"
    assert parse_meminfo(text) == {"MemTotal": 24684084 * 1024, "MemAvailable": 2**20}


@pytest.mark.parametrize(
    ("available", "limit", "budget", "says"),
    [
        (8, None, None, None),
        (5, 5, 5, None),
        (4, None, None, "than what this host has available (4.00 GiB): free memory"),
        (8, 4, None, "the control group of this process still allows (4.00 GiB): raise its"),
        (8, 8, 4, "than the budget for snapshots (4.00 GiB): raise the budget"),
        (2, 3, 4, "the budget for snapshots"),
        (2, 3, None, "control group"),
    ],
)
def test_what_is_said(
    available: int, limit: int | None, budget: int | None, says: str | None
) -> None:
    found = memory_check(
        5 * GIB,
        available * GIB,
        None if limit is None else limit * GIB,
        None if budget is None else budget * GIB,
    )
    if says is None:
        assert found is None
    else:
        assert found is not None
        assert found.startswith("snapshots need 5.00 GiB of memory, which is more than ")
        assert says in found


def test_what_is_held_counts_against_the_budget() -> None:
    check_memory(10, budget=20, held=10)
    with pytest.raises(SlotMemoryError, match="budget"):
        check_memory(11, budget=20, held=10)


def _group(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_the_tightest_control_group_counts(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       9000 kB\nMemAvailable:    8000 kB\n")
    free = _group(tmp_path / "free", memory__max="max\n", memory__current="5\n")
    second = _group(
        tmp_path / "second",
        memory__max="1000\n",
        memory__current="700\n",
        memory__stat="anon 600\ninactive_file 50\nactive_file 50\n",
    )
    first = _group(
        tmp_path / "first",
        memory__limit_in_bytes="500\n",
        memory__usage_in_bytes="400\n",
        memory__stat="inactive_file 1\ntotal_inactive_file 100\n",
    )
    full = _group(tmp_path / "full", memory__max="10\n", memory__current="70\n")
    room = MemoryRoom(8000 * 1024, None)
    assert memory_room(meminfo, []) == memory_room(meminfo, [free, tmp_path / "none"]) == room
    assert memory_room(meminfo, [free, second]).limit_bytes == 350
    assert memory_room(meminfo, [second, first]).limit_bytes == 200
    assert memory_room(meminfo, [first, full]).limit_bytes == 0


def test_this_host_has_some() -> None:
    assert memory_room().available_bytes > 2**20
