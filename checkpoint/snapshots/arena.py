"""Slots in the memory of the trainer itself: they end with it, flushes run beside it."""

import mmap
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress

import numpy as np

from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.errors import SlotMemoryError
from everstep.checkpoint.host_memory import check_memory
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.snapshots.flush import flush_slot
from everstep.checkpoint.snapshots.memory import Flushed, FlushOrder
from everstep.checkpoint.snapshots.slot_format import PAGE_BYTES

FAILED_WAIT_S = 30.0
"""So long a process that failed waits for its flushes: ranks that they need may be gone."""
PREFAULT_THREADS = 4


class ArenaMemory:
    """Memory of this process for the snapshots of one rank; see ``SlotMemory``.

    Flushes are carried out by a thread, one after the other as they were ordered. A forked child
    has no part in the memory: it would make the kernel copy every page that is captured into.

    Args:
        budget_bytes: how much memory snapshots may take; None: what the host and the control group
            of this process have left.
    """

    def __init__(self, *, budget_bytes: int | None = None) -> None:
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._held: dict[tuple[int, int], list[ByteArray]] = {}
        """By size and number of slots."""
        self._current: tuple[int, int] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="everstep-flush")
        self._flushes: set[Future[Flushed]] = set()
        self._stopped = threading.Event()
        self._closed = False

    def reserve(self, slot_bytes: int, slots: int) -> Sequence[ByteArray]:
        """See ``SlotMemory.reserve``; the pages are there when it returns."""
        if slot_bytes <= 0 or slots <= 0:
            raise ValueError(f"{slots} slots of {slot_bytes} bytes: expected at least one of each")
        with self._lock:
            self._check_open()
            key = (slot_bytes, slots)
            if key not in self._held:
                held = sum(size * number for size, number in self._held)
                check_memory(slot_bytes * slots, self._budget_bytes, held)
                self._held[key] = _new_slots(slot_bytes, slots)
            self._current = key
            return tuple(self._held[key])

    def free_others(self) -> None:
        """See ``SlotMemory.free_others``; memory goes when nobody has a view of it any more."""
        with self._lock:
            self._held = {key: held for key, held in self._held.items() if key == self._current}

    def sealed(self, index: int, all_sealed: StepId | None) -> None:
        """See ``SlotMemory.sealed``: nobody else is to be told."""
        with self._lock:
            self._slot(index)

    def flush(self, index: int, order: FlushOrder) -> "Future[Flushed]":
        """See ``SlotMemory.flush``."""
        with self._lock:
            slot = self._slot(index)
            future = self._thread.submit(flush_slot, slot, order, cancelled=self._stopped.is_set)
            self._flushes.add(future)
        future.add_done_callback(self._flushes.discard)
        return future

    def close(self, *, finished: bool = True) -> None:
        """See ``SlotMemory.close``; the memory ends with the process in any case.

        Args:
            finished: False: waits for ``FAILED_WAIT_S`` at most, and cancels what is left then.
        """
        with self._lock:
            self._closed = True
            pending = list(self._flushes)
        if not finished:
            wait(pending, FAILED_WAIT_S)
            self._stopped.set()
        self._thread.shutdown()
        with self._lock:
            self._held, self._current = {}, None

    def _slot(self, index: int) -> ByteArray:
        self._check_open()
        held = self._held[self._current] if self._current else []
        if not 0 <= index < len(held):
            raise SlotMemoryError(f"there is no slot {index}: {len(held)} are reserved")
        return held[index]

    def _check_open(self) -> None:
        if self._closed:
            raise SlotMemoryError("the memory for snapshots is closed: make a new one")


def _new_slots(slot_bytes: int, slots: int) -> list[ByteArray]:
    """Private memory that no forked child gets, in huge pages where there are any."""
    made = []
    for _ in range(slots):
        try:
            memory = mmap.mmap(-1, slot_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as e:
            raise SlotMemoryError(
                f"a slot of {slot_bytes} bytes for snapshots cannot be had: {e.strerror}; free "
                "memory, or save without snapshots"
            ) from e
        memory.madvise(mmap.MADV_DONTFORK)
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        made.append(np.frombuffer(memory, np.uint8))
    with ThreadPoolExecutor(min(PREFAULT_THREADS, os.cpu_count() or 1)) as pool:
        for slot in made:
            share = -(-slot_bytes // PREFAULT_THREADS // PAGE_BYTES) * PAGE_BYTES
            pieces = [slot[at : at + share] for at in range(0, slot_bytes, share)]
            list(pool.map(_touch, pieces))
    return made


def _touch(memory: ByteArray) -> None:
    """Make the kernel give every page; numpy lets other threads run meanwhile."""
    memory[::PAGE_BYTES] = 0
