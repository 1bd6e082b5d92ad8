"""When the state of a run is saved: into memory after every step, to storage when it is due."""

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.errors import NotRequested, SnapshotSkipped
from everstep.checkpoint.snapshots.handle import StepInfo
from everstep.checkpoint.snapshots.report import SnapshotReport
from everstep.checkpoint.torch_state import State
from everstep.trainer.config import CheckpointConfig

TRANSFER_EVERY_S = 0.5
"""Least time between two reports of a save or load that is under way."""

Say = Callable[..., None]
"""``say(kind, **facts)``: a report to the launcher."""


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Host memory that snapshots take."""

    where: str
    """'on this node', 'on rank 0'."""
    used_bytes: int
    predicted_bytes: int | None
    """By the config alone; None: it cannot be known from that."""


class Saves:
    """The saves of one run; every rank makes the same calls in the same order.

    Args:
        checkpointer: takes them.
        config: how often, and whether into memory.
        say: is told what is durable.
        durable_step: the newest step that is durable already; 0: none.
        memory_use: what snapshots take now.
        timeout_s: how long ``settle`` waits at most.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        config: CheckpointConfig,
        say: Say,
        durable_step: int,
        memory_use: Callable[[], "MemoryUse"],
        timeout_s: float,
    ) -> None:
        self._timeout_s = timeout_s
        self._checkpointer, self._config, self._say = checkpointer, config, say
        self._memory_use = memory_use
        self.memory_use: MemoryUse | None = None
        """What snapshots took at the end; None before, and without snapshots."""
        self.durable_step = durable_step
        """Newest step that is known to be durable; 0: none."""
        self._under_way: list[Future[StepInfo]] = []
        self._outage = False

    @property
    def in_memory(self) -> bool:
        """Whether there are snapshots."""
        return self._config.memory is not None

    def report(self) -> SnapshotReport:
        """How snapshots have gone so far, on this rank."""
        return self._checkpointer.report()

    def after_step(self, step: int, state: Callable[[], State], *, final: bool) -> None:
        """Save the state after a step, where it is due.

        Args:
            step: that was done.
            state: makes what is saved.
            final: nothing is trained after it: it is made durable before this returns.

        Raises:
            SaveFailedError: some rank could not save, or what is final could not be made durable.
        """
        self._look()
        if self.in_memory:
            handle = self._checkpointer.save(step, state(), durable=True if final else None)
            self._under_way.append(handle.durable)
            if final:
                # before the last save lets any rank go, and its memory with it
                self.memory_use = self._memory_use()
                self._durable(handle.durable.result())
            return
        if final or (self._config.every_steps > 0 and step % self._config.every_steps == 0):
            told = transfer_teller(self._say, f"saving step {step}")
            handle = self._checkpointer.save(step, state(), on_bytes=told)
            self._durable(handle.durable.result())

    def settle(self) -> int:
        """Wait until what is on its way to storage is there, or is not; the newest durable step."""
        wait(self._under_way, self._timeout_s)
        self._look()
        return self.durable_step

    def tell(self, steps: int, trained_s: float) -> None:
        """Report how snapshots have gone, after the last step; nothing where there are none.

        Args:
            steps: that were trained since the start.
            trained_s: time in them; waiting for copies is in it, saving is not.
        """
        if self.memory_use is None:
            return
        report = self.report()
        lost_s = report.save_s + report.stall_s
        useful_s = trained_s - report.stall_s
        self._say(
            "snapshots",
            taken=report.taken,
            skipped=report.skipped,
            last_skip=report.last_skip,
            seconds_per_step=lost_s / steps if steps else None,
            inflation=lost_s / useful_s if useful_s > 0 else 0.0,
            where=self.memory_use.where,
            memory_bytes=self.memory_use.used_bytes,
            predicted_bytes=self.memory_use.predicted_bytes,
            sealed=report.newest_sealed,
            durable=self.durable_step,
        )

    def _look(self) -> None:
        """Tell of what has become durable meanwhile, and once when something could not."""
        for future in [future for future in self._under_way if future.done()]:
            self._under_way.remove(future)
            error = future.exception()
            if error is None:
                self._durable(future.result())
            elif not isinstance(error, NotRequested | SnapshotSkipped) and not self._outage:
                self._outage = True
                self._say("not_saved", why=str(error))

    def _durable(self, info: StepInfo) -> None:
        if info.step <= self.durable_step:
            return
        self.durable_step, self._outage = info.step, False
        self._say(
            "saved", step=info.step, path=info.path, bytes=info.size_bytes, seconds=info.duration_s
        )


def transfer_teller(say: Say, what: str) -> Callable[[int], None]:
    """Reports how many bytes this rank has moved, now and then; the first time after a while."""
    told_s = time.monotonic()

    def told(done_bytes: int) -> None:
        nonlocal told_s
        if time.monotonic() - told_s > TRANSFER_EVERY_S:
            told_s = time.monotonic()
            say("transfer", what=what, bytes=done_bytes)

    return told
