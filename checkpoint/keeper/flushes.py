"""The flushes of a keeper: each in a thread, one per snapshot and rank, however often asked for."""

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.keeper.slots import Slot
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.snapshots.memory import Flushed, FlushOrder

FlushKey = tuple[str, StepId, int, str, int]
Outcome = Flushed | Exception
Waiter = Callable[[Outcome], None]


class FlushSlot(Protocol):
    """``snapshots.flush.flush_slot``, or what stands for it in tests."""

    def __call__(
        self,
        slot: ByteArray,
        order: FlushOrder,
        *,
        on_bytes: Callable[[int], None] | None = None,
        cancelled: Callable[[], bool],
    ) -> Flushed:
        """Make a snapshot durable; blocks."""
        ...


@dataclass(eq=False, kw_only=True)
class _Run:
    slot: Slot
    order: FlushOrder
    began_s: float
    waiters: list[Waiter] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)
    written_bytes: int = 0

    def wrote(self, n_bytes: int) -> None:
        """So much of the pack is written so far."""
        self.written_bytes = n_bytes


class Flushes:
    """What is being flushed, and what came of it. Used by one thread, the keeper's loop.

    Args:
        flush: does it.
        post: has the loop call something, from any thread.
        changed: is told of each slot that is needed from now on (True), or not any more (False).
    """

    def __init__(
        self,
        flush: FlushSlot,
        post: Callable[[Callable[[], None]], None],
        changed: Callable[[Slot, FlushOrder, bool], None],
    ) -> None:
        self._flush = flush
        self._post = post
        self._changed = changed
        self._running: dict[FlushKey, _Run] = {}
        self._counts = {"done": 0, "failed": 0}
        self._last: dict[str, Any] | None = None

    @property
    def busy(self) -> bool:
        """True while something is being flushed."""
        return bool(self._running)

    def steps(self) -> set[StepId]:
        """The snapshots that are being flushed."""
        return {run.order.step_id for run in self._running.values()}

    def start(self, slot: Slot, order: FlushOrder, waiter: Waiter | None = None) -> None:
        """Flush what is in a slot, unless that is under way.

        Args:
            slot: holds the snapshot.
            order: how.
            waiter: is told what came of it, from the loop.
        """
        set_id = slot.shape.set_id
        key = (order.directory, order.step_id, order.rank, set_id, slot.index)
        run = self._running.get(key)
        if run is None:
            run = _Run(slot=slot, order=order, began_s=time.monotonic())
            self._running[key] = run
            self._changed(slot, order, True)
            name = f"flush-{order.step_id.step}-{order.rank}"
            threading.Thread(
                target=self._work, args=(key, run, slot.memory), name=name, daemon=True
            ).start()
        if waiter is not None:
            run.waiters.append(waiter)

    def cancel(self, which: Callable[[FlushOrder], bool] = lambda _: True) -> None:
        """Have everything end that is under way, or some of it."""
        for run in self._running.values():
            if which(run.order):
                run.cancelled.set()

    def status(self) -> dict[str, Any]:
        """For people and programs: what runs, how much was done, the last one."""
        running = [
            {
                "step": run.order.step_id.step,
                "rank": run.order.rank,
                "written_bytes": run.written_bytes,
                "seconds": round(time.monotonic() - run.began_s, 3),
            }
            for run in self._running.values()
        ]
        return {"running": running, **self._counts, "last": self._last}

    def _work(self, key: FlushKey, run: _Run, memory: ByteArray) -> None:
        try:
            outcome: Outcome = self._flush(
                memory, run.order, on_bytes=run.wrote, cancelled=run.cancelled.is_set
            )
        except Exception as error:
            outcome = error
        del memory
        self._post(lambda: self._finish(key, run, outcome))

    def _finish(self, key: FlushKey, run: _Run, outcome: Outcome) -> None:
        del self._running[key]
        seconds = time.monotonic() - run.began_s
        failed = not isinstance(outcome, Flushed)
        self._counts["failed" if failed else "done"] += 1
        self._last = {
            "step": run.order.step_id.step,
            "seconds": round(seconds, 3),
            "bytes_per_s": round(run.written_bytes / max(seconds, 1e-9)),
            "error": str(outcome) if failed else None,
        }
        self._changed(run.slot, run.order, False)
        for waiter in run.waiters:
            with contextlib.suppress(OSError):
                waiter(outcome)
