"""What the memory of the own process does beyond the contract of all slot memories."""

import gc
import os
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.errors import SaveFailedError, SlotMemoryError
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.snapshots import arena
from everstep.checkpoint.snapshots.arena import ArenaMemory
from everstep.checkpoint.snapshots.memory import FlushOrder
from tests.support.slots import sealed_slot

MIB = 2**20


def _order(root: Path, world_size: int = 1, rate: float | None = None) -> FlushOrder:
    return FlushOrder(
        directory=str(root),
        step_id=StepId(1, 1),
        rank=0,
        world_size=world_size,
        keep=1,
        rate_bytes_per_s=rate,
        deadline_s=60.0,
    )


def _mapping(address: int) -> dict[str, str]:
    """What the kernel says of the mapping that an address is in; empty where there is none."""
    found: dict[str, str] = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            if found:
                return found
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside:
            name, _, value = line.partition(":")
            found[name] = value.strip()
    return found


def test_pages_are_there_and_no_childs() -> None:
    memory = ArenaMemory()
    (slot,) = memory.reserve(8 * MIB + 4096, 1)
    facts = _mapping(slot.ctypes.data + 4 * MIB)
    assert int(facts["Rss"].split()[0]) >= 8 * 1024
    assert "dc" in facts["VmFlags"].split()  # is not copied on fork
    memory.close()


def test_the_budget_is_for_old_and_new_slots_together() -> None:
    memory = ArenaMemory(budget_bytes=4 * MIB)
    memory.reserve(MIB, 2)
    with pytest.raises(SlotMemoryError, match="budget for snapshots"):
        memory.reserve(MIB, 3)
    memory.reserve(2 * MIB, 1)
    memory.free_others()
    memory.reserve(MIB, 2)
    memory.close()


def test_memory_goes_with_the_last_view_of_it() -> None:
    memory = ArenaMemory()
    old = memory.reserve(4 * MIB, 1)[0]
    address = old.ctypes.data
    memory.reserve(MIB, 1)
    memory.free_others()
    old[:] = 3
    assert _mapping(address)
    del old
    gc.collect()
    facts = _mapping(address)
    assert not facts or int(facts["Rss"].split()[0]) < 4 * 1024
    memory.close()


@pytest.mark.parametrize("numbers", [(0, 1), (4096, 0), (-1, 2)])
def test_slots_of_nothing_are_refused(numbers: tuple[int, int]) -> None:
    memory = ArenaMemory()
    with pytest.raises(ValueError, match="at least one of each"):
        memory.reserve(*numbers)
    memory.close()


def test_a_failed_process_waits_for_so_long_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena, "FAILED_WAIT_S", 0.2)
    memory = ArenaMemory()
    (slot,) = memory.reserve(64 * 4096, 1)
    sealed_slot(StepId(1, 1), slot=slot)
    slow = memory.flush(0, _order(tmp_path, rate=10.0))
    after_it = memory.flush(0, _order(tmp_path))
    begun_s = time.monotonic()
    memory.close(finished=False)
    assert time.monotonic() - begun_s < 10
    for future in (slow, after_it):
        with pytest.raises(SaveFailedError, match="cancelled"):
            future.result(0)
    assert CheckpointDirectory(tmp_path).committed() == []


def test_nobody_waits_while_a_flush_runs(tmp_path: Path) -> None:
    memory = ArenaMemory()
    slots = memory.reserve(64 * 4096, 2)
    sealed_slot(StepId(1, 1), slot=slots[0])
    future = memory.flush(0, _order(tmp_path, rate=20_000.0))
    assert memory.reserve(64 * 4096, 2)[1] is slots[1]
    memory.sealed(1, StepId(1, 1))
    assert not future.done()
    memory.close()
    assert future.done()
    assert np.any(slots[0])


def test_threads_end_with_the_memory(tmp_path: Path) -> None:
    before = threading.active_count()
    memory = ArenaMemory()
    sealed_slot(StepId(1, 1), slot=memory.reserve(64 * 4096, 1)[0])
    memory.flush(0, _order(tmp_path)).result(20)
    memory.close()
    assert threading.active_count() == before
    assert os.path.exists(tmp_path / "step-00000001-g00001" / "manifest.json")
