"""From copied to sealed, and on to storage: what is done for a snapshot beside the training."""

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

from everstep.checkpoint.collective import describe
from everstep.checkpoint.errors import CheckpointError, EverstepError
from everstep.checkpoint.layout import Fragment
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.ownership import Ownership
from everstep.checkpoint.snapshots.board import SlotBoard
from everstep.checkpoint.snapshots.capture import Capture, CapturePlan
from everstep.checkpoint.snapshots.flushing import Flushing
from everstep.checkpoint.snapshots.handle import SaveHandle, refuse
from everstep.checkpoint.snapshots.memory import FlushOrder, OutlivingMemory, SlotMemory
from everstep.checkpoint.snapshots.report import SnapshotReport
from everstep.checkpoint.snapshots.slot_format import PartTooLargeError, owner_digest

_WAIT_S = 0.5


@dataclass(eq=False, kw_only=True)
class Snapshot:
    """One step on its way into a slot, or in it."""

    plan: CapturePlan
    board: SlotBoard
    index: int
    step_id: StepId
    capture: Capture
    handle: SaveHandle
    flush: bool
    urgent: bool
    """It is to be durable as soon as it can be."""
    probes: list[tuple[torch.optim.Optimizer, int, Fragment, bytes | None]]
    """For each optimizer, how often its hook had fired, and some values that it updates."""
    begun_s: float = field(default_factory=time.perf_counter)
    fenced: bool = False
    """Nothing of it is left to be copied."""
    over: threading.Event = field(default_factory=threading.Event)
    """It is sealed, or came to nothing."""


class Sealing:
    """Completes snapshots of one rank, one after the other, in the thread beside the training.

    Args:
        memory: where they are.
        owner: the job's right to write, whose generation they are of.
        flushing: follows what goes to storage.
        report: takes what happens.
        order_for: what a flush of a snapshot is told.
    """

    def __init__(
        self,
        memory: SlotMemory,
        owner: Ownership,
        flushing: Flushing,
        report: SnapshotReport,
        order_for: Callable[[Snapshot], FlushOrder],
    ) -> None:
        self._memory, self._owner, self._flushing = memory, owner, flushing
        self._report, self._order_for = report, order_for
        self.failed: set[int] = set()
        """Steps that this rank has not captured, and that all ranks are to forget."""
        self.all_sealed: StepId | None = None
        """The newest snapshot that is known to be sealed on all ranks."""
        self.foreign_pins: set[int] = set()
        """Slots that somebody used when they were reserved, from before this process."""
        self.outgrown = False
        """A part did not fit into its slot any more: make a new plan, with larger slots."""
        self.defect: BaseException | None = None
        """An error that is nobody's fault but ours."""
        self.closed = False
        """The run ends: copies that are not complete come to nothing."""

    def complete(self, snapshot: Snapshot) -> None:
        """Wait for the copies, seal, and order the flush; errors are kept, not raised."""
        step = snapshot.step_id.step
        try:
            self._seal(snapshot, step)
        except Exception as e:
            if isinstance(e, PartTooLargeError):
                self.outgrown = True  # before the failure is told, or the next step fails, too
            self.failed.add(step)
            self._report.failed += 1
            snapshot.board.give_up(snapshot.index)
            error = e if isinstance(e, CheckpointError) else CheckpointError(describe(e))
            for future in (snapshot.handle.captured, snapshot.handle.durable):
                refuse(future, error)
            if not isinstance(e, EverstepError | OSError) and not self.closed:
                self.defect = e
        finally:
            snapshot.over.set()

    def _seal(self, snapshot: Snapshot, step: int) -> None:
        while not snapshot.capture.wait(_WAIT_S):
            if self.closed and not snapshot.capture.done:
                raise CheckpointError(f"step {step} was not captured to its end: the run ended")
        snapshot.handle.captured.set_result(None)
        board, index = snapshot.board, snapshot.index
        if not board.holds(index, snapshot.step_id):
            raise CheckpointError(f"step {step} was not captured by all ranks")
        owner = owner_digest(self._owner.owner)
        snapshot.plan.seal(snapshot.capture, snapshot.step_id, owner, self._owner.lineage())
        board.seal(index, snapshot.step_id, pinned=snapshot.flush)
        self._report.newest_sealed = step
        self._memory.sealed(index, self.all_sealed)
        if snapshot.flush:
            future = self._memory.flush(index, self._order_for(snapshot))
            future.add_done_callback(lambda _: board.unpin(index))
            self._flushing.watch(snapshot.step_id, future, snapshot.handle)
        if isinstance(self._memory, OutlivingMemory):
            with contextlib.suppress(EverstepError):  # it counts without the keeper's answer, too
                self._memory.tell(asdict(self._report))
                self._look_at_pins(self._memory, board)

    def _look_at_pins(self, memory: OutlivingMemory, board: SlotBoard) -> None:
        """What readers and flushes of the attempt before still used, they may have let go of."""
        if self.foreign_pins:
            left = self.foreign_pins & set(memory.pinned())
            for index in self.foreign_pins - left:
                board.unpin(index)
            self.foreign_pins = left
