"""Snapshots on their way to storage: when the next is due, what became of the last."""

import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future

from everstep.checkpoint.errors import SaveFailedError
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.snapshots.handle import SaveHandle, StepInfo
from everstep.checkpoint.snapshots.memory import Flushed
from everstep.checkpoint.snapshots.report import SnapshotReport
from everstep.checkpoint.snapshots.slots import NOTHING

_RETRY_S = 1.0
_LONGEST_RETRY_S = 60.0


class Flushing:
    """The flushes of one rank. Thread-safe.

    While storage is away, training goes on: there is one warning, and the interval tries again
    after pauses that grow to a minute.

    Args:
        rank: of this process; rank 0 watches the clock.
        every_s: seconds between durable snapshots; None: there is no such interval.
        report: takes what happens.
        clock: seconds.
    """

    def __init__(
        self,
        rank: int,
        every_s: float | None,
        report: SnapshotReport,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rank, self._every_s = rank, every_s if rank == 0 else None
        self._report, self._clock = report, clock
        self._lock = threading.Lock()
        self._under_way: set[Future[Flushed]] = set()
        self._since_s = clock()
        self._retry_s = _RETRY_S
        self._rest_until_s = float("-inf")
        self._failure: SaveFailedError | None = None
        self.durable_step = NOTHING
        """The newest step known to be durable, or what the run began with."""

    @property
    def idle(self) -> bool:
        """Whether an interval may begin a flush."""
        with self._lock:
            return not self._under_way and self._clock() >= self._rest_until_s

    @property
    def running(self) -> bool:
        """Whether something is being flushed."""
        with self._lock:
            return bool(self._under_way)

    @property
    def due_by_time(self) -> bool:
        """Whether the interval in seconds has passed."""
        return self._every_s is not None and self._clock() - self._since_s >= self._every_s

    def began_from(self, step: int) -> None:
        """The run goes on from a step, which counts as durable for the interval."""
        self.durable_step = step

    def watch(self, step_id: StepId, future: "Future[Flushed]", handle: SaveHandle) -> None:
        """Follow a flush that was ordered."""
        with self._lock:
            self._under_way.add(future)

        def done(future: "Future[Flushed]") -> None:
            error = future.exception()
            if error is None:
                self._succeeded(step_id, future.result(), handle)
            else:
                self._failed(step_id.step, error, handle)
            with self._lock:  # last: who sees it idle sees the rest, too
                self._under_way.discard(future)

        future.add_done_callback(done)

    def check(self) -> None:
        """Raises SaveFailedError where the last flush failed, and none after it succeeded."""
        if self._failure is not None:
            raise self._failure

    def _succeeded(self, step_id: StepId, flushed: Flushed, handle: SaveHandle) -> None:
        step = step_id.step
        with self._lock:
            self.durable_step = max(self.durable_step, step)
            self._since_s = self._clock()
            self._retry_s, self._failure = _RETRY_S, None
            self._report.newest_durable = self.durable_step
            self._report.flushes += 1
            self._report.last_flush_s = flushed.duration_s
        if flushed.warning is not None:
            warnings.warn(flushed.warning, RuntimeWarning, stacklevel=2)
        handle.durable.set_result(
            StepInfo(
                step=step,
                generation=step_id.generation,
                path=flushed.path,
                size_bytes=flushed.size_bytes,
                duration_s=flushed.duration_s,
            )
        )

    def _failed(self, step: int, error: BaseException, handle: SaveHandle) -> None:
        with self._lock:
            first = self._failure is None
            self._failure = (
                error
                if isinstance(error, SaveFailedError)
                else SaveFailedError(step, {self._rank: str(error)})
            )
            self._rest_until_s = self._clock() + self._retry_s
            self._retry_s = min(2 * self._retry_s, _LONGEST_RETRY_S)
            self._report.flushes_failed += 1
            self._report.last_flush_error = str(error)
        if first:
            warnings.warn(
                f"step {step} could not be made durable; training goes on, and a later step is "
                f"tried: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
        handle.durable.set_exception(error)
