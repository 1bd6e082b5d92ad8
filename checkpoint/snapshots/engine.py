"""Snapshots of every step: captured beside training, sealed in memory, flushed at an interval.

A save takes what forward passes change, starts the copying of the rest in native threads, and
returns; before the next update the caller helps with what is left (DataStates-LLM, arXiv
2406.10707, section 4). A thread beside the training then seals the slot and exchanges the tickets
of the next save: all ranks capture a step, or none does (``tickets.py``).
"""

import threading
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from everstep.checkpoint.collective import Collective, agree
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.copier import Copier
from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.errors import (
    CheckpointError,
    CollectiveError,
    EverstepError,
    NotRequested,
    SaveFailedError,
    StateError,
)
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.ownership import Ownership
from everstep.checkpoint.snapshots import slots as rule
from everstep.checkpoint.snapshots.agreement import Agreement
from everstep.checkpoint.snapshots.beside import Beside
from everstep.checkpoint.snapshots.board import SlotBoard
from everstep.checkpoint.snapshots.capture import CapturePlan
from everstep.checkpoint.snapshots.device_capture import capture_plan
from everstep.checkpoint.snapshots.fences import Fences
from everstep.checkpoint.snapshots.flushing import Flushing
from everstep.checkpoint.snapshots.found import found_slots
from everstep.checkpoint.snapshots.handle import (
    SaveHandle,
    no_redundancy,
    refuse,
    skipped_handle,
)
from everstep.checkpoint.snapshots.live_state import Look
from everstep.checkpoint.snapshots.memory import FlushOrder, OutlivingMemory, SlotMemory
from everstep.checkpoint.snapshots.pacing import (
    Pacing,
    PacingSettings,
    StepFacts,
    after_step,
    flush_rate,
)
from everstep.checkpoint.snapshots.planning import Planned, Planning
from everstep.checkpoint.snapshots.report import Interval, SnapshotReport
from everstep.checkpoint.snapshots.sealing import Sealing, Snapshot
from everstep.checkpoint.snapshots.slots import NOTHING
from everstep.checkpoint.snapshots.tickets import Decision, Ticket, ticket_of
from everstep.checkpoint.state_capture import Place
from everstep.checkpoint.torch_state import State

_POLL_S = 0.01
_ABANDON_S = 5.0
"""How long a process that failed waits for the thread beside the training."""
_UNPROVEN = 3
"""After so many captures that waited, a warning says why they do."""


class SnapshotEngine:
    """Snapshots of one rank; all ranks make the same calls in the same order.

    Args:
        directory: where durable checkpoints go.
        collective: the ranks; nobody else uses it between a save and the next.
        owner: the job's right to write to the directory.
        place: of this rank.
        memory: where snapshots are.
        interval: between durable checkpoints.
        order: what flush orders have beside step and rank.
        threads: copy threads.
        timeout_s: how long other ranks, or a slot for a save that must not be skipped, are waited
            for.
        lazy_objects: names of objects whose tensors change only after ``wait_captured``.
        pacing: how copies and flushes are paced.
    """

    def __init__(
        self,
        directory: CheckpointDirectory,
        collective: Collective,
        owner: Ownership,
        place: Place,
        memory: SlotMemory,
        *,
        interval: Interval,
        order: Mapping[str, Any],
        threads: int = 1,
        timeout_s: float = 600.0,
        lazy_objects: Collection[str] = (),
        pacing: PacingSettings | None = None,
    ) -> None:
        self._directory, self._collective, self._owner = directory, collective, owner
        self._memory, self._interval = memory, interval
        # a keeper has another working directory
        where = str(directory.root.absolute()) if directory.has_lock else directory.describe()
        self._order_facts = {"directory": where, **order}
        self._timeout_s = timeout_s
        self._pacing = Pacing(settings=pacing or PacingSettings(paced_copy=False))
        self._threads = threads
        self._copier = Copier(threads=threads, nice=_NICE)
        self._fences = Fences(self._fence)
        self._beside = Beside("everstep-snapshots")
        self._agreement = Agreement(
            collective,
            self._beside,
            self._ticket,
            durable_every=interval.steps,
            timeout_s=timeout_s,
        )
        self.report = SnapshotReport()
        self._flushing = Flushing(collective.rank, interval.seconds, self.report)
        self._planning = Planning(collective, place, interval=interval, lazy_objects=lazy_objects)
        self._sealing = Sealing(memory, owner, self._flushing, self.report, self._order_of)
        self._plan: CapturePlan | None = None
        self._board = SlotBoard((), ())
        self._layout: int | None = None
        self._tells_optimizer = True
        self._restored: StepId | None = None
        self._current: Snapshot | None = None
        self._fence_lock = threading.Lock()
        self._others_from: int | None = None
        self._closed = False

    def began_from(self, step_id: StepId | None, *, memory: bool) -> None:
        """What the run goes on from, before the first save.

        Args:
            step_id: the step that was loaded; None: nothing was.
            memory: whether it was loaded from memory.
        """
        self._restored = step_id if memory else None
        self._flushing.began_from(NOTHING if step_id is None else step_id.step)
        self._drop_plan()
        self._layout, self._current = None, None
        self._board.adopt(self._restored)  # flushes of it go on

    def prepare_load(self, state: State) -> None:
        """Before other calls use the collective; optimizers are hooked the earlier the better."""
        self._finish_copies()
        self._agreement.post()
        self._agreement.settle()
        if self._current is not None:
            self._current.over.wait(self._timeout_s)
        self._fences.watch(state.optimizers)

    def save(self, step: int, state: State, durable: bool | None) -> SaveHandle:
        """See ``Checkpointer.save``."""
        begun_s = time.perf_counter()
        if self._sealing.defect is not None:
            raise self._sealing.defect
        self._finish_copies()
        self._check_fenced()
        self._fences.watch(state.optimizers)
        look = self._plan.live.look(state) if self._plan is not None else None
        decision, look = self._decide(step, state, look, urgent=durable is True)
        if decision.action == "skip" or look is None:
            handle = self._skip(step, decision.reason or "its layout has changed just now")
        else:
            urgent = durable is True
            flush = urgent or (decision.flush and durable is not False)
            handle = self._begin(step, look, decision.all_sealed, flush=flush, urgent=urgent)
            if not self._fences.proven:
                self._wait_unproven()
        self.report.save_s += time.perf_counter() - begun_s
        return handle

    def wait_captured(self) -> None:
        """Return when live tensors may change; the caller helps with the copies that are left."""
        self._fences.passed()
        self._fence()

    def close(self, *, finished: bool) -> None:
        """Wait for what was begun, and let go of everything; may be called twice.

        Args:
            finished: False: an error ends the run: what is under way is given up, what is sealed
                stays where memory outlives this process.

        Raises:
            SaveFailedError: the last flush failed, and none after it succeeded.
        """
        if self._closed:
            return
        self._closed = self._sealing.closed = True
        self._fences.close()
        current = self._current
        if current is not None and not current.capture.done:
            if finished:
                current.capture.help()
            else:
                current.capture.cancel()
        self._beside.close(self._timeout_s if finished else _ABANDON_S)
        self._copier.close()
        self._drop_plan()
        self._memory.close(finished=finished)
        if finished:
            if self._sealing.defect is not None:
                raise self._sealing.defect
            self._flushing.check()

    # One decision of all ranks

    def _decide(
        self, step: int, state: State, look: Look | None, *, urgent: bool
    ) -> tuple[Decision, Look | None]:
        deadline_s = time.monotonic() + self._timeout_s
        fresh = urgent
        if look is None or self._sealing.outgrown:
            self._layout = None
        self._agreement.post()  # optimizers of other ranks may have stepped where none of this did
        while True:
            decision = self._agreement.decide(step, fresh=fresh)
            fresh = True
            match decision.action:
                case "out_of_step":
                    raise CollectiveError(f"step {step} cannot be saved: {decision.reason}")
                case "replan":
                    look = self._make_plan(step, state)
                    continue
                case "skip":
                    if decision.void is not None:
                        self._board.forget(decision.void)
                        self._sealing.failed.discard(decision.void)
                    self._learn_all_sealed(decision.all_sealed)
                    if urgent:
                        if decision.void is None:
                            self._wait_for_slot(step, deadline_s)
                        continue
                case "capture":
                    self._learn_all_sealed(decision.all_sealed)
                    if look is None:  # the others capture it: all are to forget it
                        self._sealing.failed.add(step)
            return decision, look

    def _ticket(self, step: int) -> Ticket:
        """What this rank has to say before a save."""
        return replace(
            ticket_of(
                self._board.slots,
                generation=self._owner.generation or 0,
                step=step,
                layout=self._layout,
            ),
            failed=min(self._sealing.failed, default=None),
            durable=self._flushing.durable_step,
            flush_idle=self._flushing.idle,
            due_by_time=self._flushing.due_by_time,
        )

    def _wait_for_slot(self, step: int, deadline_s: float) -> None:
        while not self._board.may_capture() and not self._sealing.failed:
            if time.monotonic() > deadline_s:
                raise CheckpointError(
                    f"step {step} was to be made durable, and within {self._timeout_s:g} s no slot "
                    "became free for it: is the storage too slow, or away? (last error: "
                    f"{self.report.last_flush_error or 'none'})"
                )
            time.sleep(_POLL_S)

    def _learn_all_sealed(self, step: int) -> None:
        if step != NOTHING:
            self._sealing.all_sealed = self._board.sealed_as(step) or self._sealing.all_sealed
        since = self._others_from
        if since is not None and step >= since and not self._flushing.running:
            self._others_from = None
            self._beside.do(self._free_others)

    def _free_others(self) -> None:
        try:
            self._memory.free_others()
        except EverstepError as e:
            warnings.warn(f"memory of earlier snapshots is not freed: {e}", stacklevel=2)

    def _skip(self, step: int, why: str) -> SaveHandle:
        self.report.skipped += 1
        self.report.last_skip = why
        return skipped_handle(step, why)

    # Planning

    def _make_plan(self, step: int, state: State) -> Look:
        """Agree with the other ranks on who writes what; reserve memory for it."""
        if self._current is not None:
            self._current.over.wait(self._timeout_s)
        planned = self._planning.plan(step, state)
        self._owner.begin(step)
        outcome = agree(self._collective, "reserved", lambda: self._reserve(planned))
        if outcome.causes:
            raise SaveFailedError(step, outcome.causes) from outcome.error
        self._others_from, self._layout = step, planned.layout
        self._tells_optimizer = planned.tells_optimizer
        return planned.live.first

    def _reserve(self, planned: Planned) -> None:
        plan = capture_plan(
            planned.live,
            planned.pack,
            self._planning.file,
            self._collective.world_size,
            threads=self._threads,
        )
        self._drop_plan()
        count = rule.slots_needed(flush=self._interval.flushes, protect=False)
        memories = self._memory.reserve(plan.layout.slot_bytes, count)
        if not self._board.is_of(memories):  # else what it holds stays, and is still being flushed
            self._board = SlotBoard(memories, self._left_in(memories))
        self._plan, self._sealing.outgrown = plan, False
        if isinstance(self._memory, OutlivingMemory):
            self._memory.set_orphan_order(self._order(StepId(0, 0), None))
        self.report.snapshot_bytes = planned.pack.size_bytes
        self.report.reserved_bytes = sum(map(len, memories))

    def _drop_plan(self) -> None:
        """Nothing is being captured any more."""
        if self._plan is not None:
            self._plan.close()
        self._plan = None

    def _left_in(self, memories: Sequence[ByteArray]) -> rule.Slots:
        """What a process before this one has left in slots, as far as it counts."""
        slots = found_slots(
            memories,
            self._collective.rank,
            self._collective.world_size,
            self._directory.generations(),
        )
        slots = rule.adopt(slots, self._restored)
        if isinstance(self._memory, OutlivingMemory):
            self._sealing.foreign_pins = set(self._memory.pinned())
            slots = tuple(
                replace(slot, pinned=index in self._sealing.foreign_pins)
                for index, slot in enumerate(slots)
            )
        return slots

    # Capturing

    def _begin(
        self, step: int, look: Look, all_sealed: int, *, flush: bool, urgent: bool
    ) -> SaveHandle:
        plan, board, generation = self._plan, self._board, self._owner.generation
        assert plan is not None
        assert generation is not None
        if not self._tells_optimizer:
            look.context.pop("optimizer", None)  # an earlier rank tells the same
        step_id = StepId(generation, step)
        index = board.begin(step_id, all_sealed)
        handle = SaveHandle(step=step)
        refuse(handle.protected, no_redundancy())
        if not flush:
            refuse(handle.durable, _not_due(step))
        rate = self._pacing.copy_bytes_per_s
        current = Snapshot(
            plan=plan,
            board=board,
            index=index,
            step_id=step_id,
            capture=plan.begin(self._copier, board.memory(index), look, rate),
            handle=handle,
            flush=flush,
            urgent=urgent,
            probes=[(o, self._fences.count(o), f, plan.sample(f)) for o, f in plan.probes],
        )
        self._current = current
        self._beside.do(lambda: self._sealing.complete(current))
        self.report.taken += 1
        return handle

    def _fence(self) -> None:
        """Before an update: whatever is not copied yet is copied now, by this thread, too."""
        self._finish_copies()
        self._agreement.post()

    def _finish_copies(self, *, at_fence: bool = True) -> None:
        """Return when nothing of the last snapshot is left to be copied, on any thread.

        Args:
            at_fence: a step's worth of time has passed since the copies began: it tells how long
                steps take.
        """
        with self._fence_lock:  # hooks of optimizers inside of backward run on other threads
            current = self._current
            if current is None:
                return
            if current.fenced:
                current.capture.help()  # a device's queue of this thread may be another one
                return
            window_s = time.perf_counter() - current.begun_s
            copied_bytes = current.capture.copied_bytes
            if not current.capture.done:
                self.report.stall_s += current.capture.help()
            current.fenced = True
        if not at_fence:
            return
        self.report.copied_bytes += copied_bytes
        facts = StepFacts(
            window_s=window_s,
            snapshot_bytes=current.plan.pack.data_bytes,
            background_bytes=copied_bytes,
            background_s=min(window_s, current.capture.elapsed_s),
        )
        self._pacing = after_step(self._pacing, facts)
        if copied_bytes and facts.background_s > 0:
            self.report.copy_bytes_per_s = copied_bytes / facts.background_s

    def _wait_unproven(self) -> None:
        """No optimizer has shown yet that it would wait: copy now."""
        self._finish_copies(at_fence=False)
        self.report.waiting += 1
        if self.report.waiting == _UNPROVEN:
            warnings.warn(
                "snapshots are copied while training waits, since some optimizer of the State has "
                "not called its step hooks so far: give State(optimizer=...) the optimizers that "
                "step, or call checkpointer.wait_captured() before tensors change",
                RuntimeWarning,
                stacklevel=4,
            )

    def _check_fenced(self) -> None:
        """Raises StateError where an optimizer has changed tensors without calling its hooks."""
        current = self._current
        if current is None or not self._fences.proven:
            return
        for optimizer, count, fragment, sample in current.probes:
            if self._fences.count(optimizer) == count and current.plan.sample(fragment) != sample:
                self._sealing.failed.add(current.step_id.step)
                raise StateError(
                    f"{fragment.spec.name!r} has changed since step {current.step_id.step} was "
                    f"saved, but {type(optimizer).__name__} has not called its step hooks, which "
                    "wait for the copy: call checkpointer.wait_captured() before every change that "
                    "is not a step of an optimizer of the State"
                )

    # Storage

    def _order_of(self, snapshot: Snapshot) -> FlushOrder:
        rate = None if snapshot.urgent else self._flush_rate(snapshot.plan.pack.size_bytes)
        return self._order(snapshot.step_id, rate)

    def _order(self, step_id: StepId, rate_bytes_per_s: float | None) -> FlushOrder:
        return FlushOrder(
            **self._order_facts,
            step_id=step_id,
            rank=self._collective.rank,
            world_size=self._collective.world_size,
            rate_bytes_per_s=rate_bytes_per_s,
        )

    def _flush_rate(self, n_bytes: int) -> float | None:
        """Slow enough to disturb little, fast enough for the interval."""
        steps, windows_s = self._interval.steps, self._pacing.windows_s
        by_steps_s = steps * min(windows_s) if steps is not None and windows_s else None
        known = [s for s in (by_steps_s, self._interval.seconds) if s]
        if not known:
            return None
        return flush_rate(n_bytes, min(known), min(known), self._pacing.settings)


_NICE = 19
"""Of the copy threads: they take processors that are idle; the fence does the rest."""


def _not_due(step: int) -> NotRequested:
    return NotRequested(
        f"step {step} is in memory only, as its turn to be made durable has not come: "
        "save(..., durable=True) asks for it"
    )
