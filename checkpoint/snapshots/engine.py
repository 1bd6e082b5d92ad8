"""Snapshots of every step: captured beside training, sealed in memory, flushed at an interval.

A save takes what forward passes change, starts the copying of the rest in native threads, and
returns; before the next update the caller helps with what is left (DataStates-LLM, arXiv
2406.10707, section 4). A thread of its own then seals the slot and posts the ticket of the next
save, which is answered beside the update: all ranks capture a step, or none does (``tickets.py``).
"""

import hashlib
import os
import queue
import struct
import threading
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from everstep.checkpoint.collective import Collective, agree, describe
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.copier import Copier
from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.errors import (
    CheckpointError,
    CollectiveError,
    NotRequested,
    SaveFailedError,
    StateError,
)
from everstep.checkpoint.layout import Fragment
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.optimizer_parts import digest_values
from everstep.checkpoint.ownership import Ownership
from everstep.checkpoint.save_plan import SavePlan
from everstep.checkpoint.snapshots import slots as rule
from everstep.checkpoint.snapshots.capture import CapturePlan, HostCapture
from everstep.checkpoint.snapshots.fences import Fences
from everstep.checkpoint.snapshots.handle import (
    SaveHandle,
    StepInfo,
    no_redundancy,
    refuse,
    skipped_handle,
)
from everstep.checkpoint.snapshots.live_state import LiveState, Look
from everstep.checkpoint.snapshots.memory import (
    Flushed,
    FlushOrder,
    OutlivingMemory,
    SlotMemory,
)
from everstep.checkpoint.snapshots.slot_format import owner_digest, read_seal, unseal
from everstep.checkpoint.snapshots.slots import NOTHING, SlotState
from everstep.checkpoint.snapshots.tickets import (
    TICKET_NUMBERS,
    Decision,
    Ticket,
    decide,
    encode,
    ticket_of,
)
from everstep.checkpoint.state_capture import Place
from everstep.checkpoint.torch_state import State

_NUMBERS = struct.Struct(f"<{TICKET_NUMBERS}q")
_WAIT_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Interval:
    """How often a snapshot is made durable; whichever comes first."""

    steps: int | None = None
    seconds: float | None = None

    @property
    def flushes(self) -> bool:
        """Whether there is one at all."""
        return self.steps is not None or self.seconds is not None


@dataclass(kw_only=True)
class SnapshotReport:
    """What has happened so far, on this rank."""

    taken: int = 0
    skipped: int = 0
    last_skip: str | None = None
    save_s: float = 0.0
    """Time of the caller inside of ``save``."""
    stall_s: float = 0.0
    """Time of the caller before updates, helping with copies that were not done."""
    synchronous: int = 0
    """Snapshots that were copied before ``save`` returned."""
    snapshot_bytes: int = 0
    """Size of one snapshot of this rank."""
    reserved_bytes: int = 0
    """Memory of all slots of this rank."""
    newest_sealed: int | None = None
    newest_durable: int | None = None
    flushes: int = 0
    flushes_failed: int = 0
    last_flush_error: str | None = None
    copy_bytes_per_s: float | None = None


class _Current:
    """A snapshot that is being captured, or was the last one."""

    def __init__(
        self, index: int, step_id: StepId, capture: HostCapture, handle: SaveHandle, flush: bool
    ) -> None:
        self.index, self.step_id, self.capture = index, step_id, capture
        self.handle, self.flush = handle, flush
        self.begun_s = time.perf_counter()
        self.probes: list[tuple[torch.optim.Optimizer, int, Fragment]] = []
        """For each optimizer, how often its hook had fired, and a tensor of it."""


class SnapshotEngine:
    """Snapshots of one rank; all ranks make the same calls in the same order.

    Args:
        directory: where durable checkpoints go.
        collective: the ranks; nobody else uses it between a save and the next.
        owner: the job's right to write to the directory.
        place: of this rank.
        memory: where snapshots are.
        keep: how many durable checkpoints to keep.
        interval: between durable checkpoints.
        order: what flush orders have beside step and rank.
        threads: copy threads.
        timeout_s: how long other ranks, or a slot for a save that must not be skipped, are waited
            for.
        lazy_objects: names of objects whose tensors change only after ``wait_captured``.
    """

    def __init__(
        self,
        directory: CheckpointDirectory,
        collective: Collective,
        owner: Ownership,
        place: Place,
        memory: SlotMemory,
        *,
        keep: int,
        interval: Interval,
        order: Mapping[str, Any],
        threads: int = 1,
        timeout_s: float = 600.0,
        lazy_objects: Collection[str] = (),
    ) -> None:
        self._directory, self._collective, self._owner = directory, collective, owner
        self._place, self._memory, self._interval = place, memory, interval
        # a keeper has another working directory
        where = str(directory.root.absolute()) if directory.has_lock else directory.describe()
        self._order = {"keep": keep, "directory": where, **order}
        self._timeout_s, self._lazy_objects = timeout_s, lazy_objects
        self._file = f"rank-{collective.rank:05d}-{os.urandom(4).hex()}.safetensors"
        self._copier = Copier(threads=threads)
        self._fences = Fences(self._fence)
        self._save_plan = SavePlan(collective)
        self._plan: CapturePlan | None = None
        self._layout: int | None = None
        self._tells_optimizer = True
        self._lock = threading.RLock()
        self._slots: rule.Slots = ()
        self._memories: list[ByteArray] = []
        self._restored: StepId | None = None
        self._lineage: Collection[StepId] = ()
        self._current: _Current | None = None
        self._posted: Future[tuple[Ticket, list[int]]] | None = None
        self._failed: int | None = None
        self._all_sealed: StepId | None = None
        self._durable_step = NOTHING
        self._durable_at_s = time.monotonic()
        self._foreign_pins: set[int] = set()
        self._flushes: set[Future[Flushed]] = set()
        self._stride = 1
        self._last_step = NOTHING
        self._others_freed = False
        self._outage = False
        self._warned_unproven = False
        self.report = SnapshotReport()
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    # -- what the caller does -----------------------------------------------------------------

    def began_from(
        self, step_id: StepId | None, *, memory: bool, lineage: Collection[StepId]
    ) -> None:
        """What the run goes on from, before the first save.

        Args:
            step_id: the step that was loaded; None: nothing was.
            memory: whether it was loaded from memory.
            lineage: what the next generation may resume from.
        """
        self._restored = step_id if memory else None
        self._lineage = frozenset(lineage)
        self._durable_step = NOTHING if step_id is None else step_id.step
        self._plan, self._layout, self._slots = None, None, ()

    def prepare_load(self, state: State) -> None:
        """Before other calls use the collective; optimizers are hooked the earlier the better."""
        self._finish_current()
        self._take_posted()
        self._fences.watch(state.optimizers)

    def save(self, step: int, state: State, durable: bool | None) -> SaveHandle:
        """See ``Checkpointer.save``."""
        begun_s = time.perf_counter()
        self._check_fenced()
        self._finish_current()
        self._fences.watch(state.optimizers)
        look = self._plan.live.look(state) if self._plan is not None else None
        decision, look = self._agree(step, state, look, urgent=durable is True)
        if self._last_step != NOTHING:
            self._stride = step - self._last_step
        self._last_step = step
        if decision.action == "skip" or look is None:
            return self._skip(step, decision.reason or "its layout has changed just now")
        flush = durable is True or (decision.flush and durable is not False)
        handle = self._begin(step, look, decision.all_sealed, flush)
        if not self._fences.proven:
            self._capture_at_once()
        self.report.save_s += time.perf_counter() - begun_s
        return handle

    def wait_captured(self) -> None:
        """Return when live tensors may change; the caller helps with the copies that are left."""
        self._fences.passed()
        self._fence()

    def close(self, *, finished: bool) -> None:
        """Wait for what was begun, and let go of everything; may be called twice.

        Raises:
            SaveFailedError: the newest flush failed, and none after it succeeded.
        """
        if self._closed:
            return
        self._closed = True
        self._fences.close()
        current = self._current
        if current is not None and not current.capture.done:
            if finished:
                current.capture.help()
            else:
                current.capture.cancel()
        if self._thread is not None:
            self._tasks.put(None)
            self._thread.join(self._timeout_s if finished else 5.0)
        self._copier.close()
        try:
            self._memory.close(finished=finished)
        finally:
            for future in list(self._flushes):
                if finished:
                    _settle(future, self._timeout_s)
        if finished and self._outage:
            raise SaveFailedError(
                self._last_step, {self._collective.rank: str(self.report.last_flush_error)}
            )

    # -- one decision of all ranks ------------------------------------------------------------

    def _agree(
        self, step: int, state: State, look: Look | None, *, urgent: bool
    ) -> tuple[Decision, Look | None]:
        deadline_s = time.monotonic() + self._timeout_s
        posted = self._take_posted()
        if posted is not None and (urgent or posted[0].step != step):
            posted = None
        while True:
            if look is None:
                self._layout = None
            ticket, reduced = posted or self._exchange(step)
            posted = None
            decision = decide(reduced, ticket, durable_every=self._interval.steps)
            if decision.action == "out_of_step":
                raise CollectiveError(f"step {step} cannot be saved: {decision.reason}")
            if decision.action == "replan":
                look = self._make_plan(step, state)
                continue
            if decision.all_sealed != NOTHING:
                self._learn_all_sealed(decision.all_sealed)
            if decision.void is not None:
                self._void(decision.void)
                if urgent:
                    continue
            if decision.action == "skip" and urgent:
                self._wait_for_slot(step, deadline_s)
                continue
            if decision.action == "capture" and look is None:
                self._failed = step  # the others capture it: all are to forget it
            return decision, look

    def _take_posted(self) -> tuple[Ticket, list[int]] | None:
        posted, self._posted = self._posted, None
        if posted is None:
            return None
        return posted.result(self._timeout_s)

    def _exchange(self, step: int) -> tuple[Ticket, list[int]]:
        with self._lock:
            ticket = replace(
                ticket_of(
                    self._slots,
                    generation=self._owner.generation or 0,
                    step=step,
                    layout=self._layout,
                ),
                failed=self._failed,
                durable=max(self._durable_step, NOTHING),
                flush_idle=not self._flushes,
                due_by_time=self._due_by_time(),
            )
        replies = self._collective.exchange("ticket", _NUMBERS.pack(*encode(ticket)))
        rows = [_NUMBERS.unpack(reply) for reply in replies]
        return ticket, [min(column) for column in zip(*rows, strict=True)]

    def _due_by_time(self) -> bool:
        every_s = self._interval.seconds
        due = every_s is not None and time.monotonic() - self._durable_at_s >= every_s
        return due and self._collective.rank == 0

    def _post(self) -> None:
        """Post the ticket of the next save, beside whatever the caller does."""
        future: Future[tuple[Ticket, list[int]]] = Future()
        with self._lock:  # hooks of optimizers inside of backward run on other threads
            if self._posted is not None or self._plan is None:
                return
            self._posted = future
        step = self._last_step + self._stride

        def post() -> None:
            try:
                future.set_result(self._exchange(step))
            except BaseException as e:
                future.set_exception(e)

        self._do(post)

    def _wait_for_slot(self, step: int, deadline_s: float) -> None:
        while True:
            with self._lock:
                needs, newest = rule.capture_needs(self._slots), rule.newest_sealed(self._slots)
            if needs <= newest:
                return
            if time.monotonic() > deadline_s:
                raise CheckpointError(
                    f"step {step} was to be made durable, and within {self._timeout_s:g} s no slot "
                    "became free for it: is the storage much too slow? "
                    f"(last error: {self.report.last_flush_error or 'none'})"
                )
            time.sleep(0.01)

    def _learn_all_sealed(self, step: int) -> None:
        with self._lock:
            for slot in self._slots:
                if slot.sealed and slot.step_id is not None and slot.step_id.step == step:
                    self._all_sealed = slot.step_id
        mine = self._all_sealed
        if (
            not self._others_freed
            and mine is not None
            and mine.generation == self._owner.generation
        ):
            self._others_freed = True
            self._do(self._memory.free_others)

    def _void(self, step: int) -> None:
        with self._lock:
            for index, slot in enumerate(self._slots):
                if slot.step_id is not None and slot.step_id.step == step:
                    unseal(self._memories[index])
            self._slots = rule.forget(self._slots, step)
            if self._failed == step:
                self._failed = None

    def _skip(self, step: int, why: str) -> SaveHandle:
        self.report.skipped += 1
        self.report.last_skip = why
        return skipped_handle(step, why)

    # -- planning -----------------------------------------------------------------------------

    def _make_plan(self, step: int, state: State) -> Look:
        """Agree with the other ranks on who writes what; reserve memory for it."""
        found: list[LiveState] = []

        def find() -> list[str]:
            live = LiveState(state, self._place, self._lazy_objects)
            found.append(live)
            context = live.first.context
            return [self._save_plan.digest(live.fragments), digest_values(context.get("optimizer"))]

        outcome = agree(self._collective, "captured", find)
        if outcome.causes:
            raise SaveFailedError(step, outcome.causes) from outcome.error
        layouts, optimizers = zip(*outcome.results, strict=True)
        self._save_plan.update(layouts)
        rank = self._collective.rank
        self._tells_optimizer = optimizers.index(optimizers[rank]) == rank
        self._owner.begin(step)

        def reserve() -> None:
            plan = CapturePlan(
                found[0], self._save_plan.pack(), self._file, self._collective.world_size
            )
            count = rule.slots_needed(flush=self._interval.flushes, protect=False)
            memories = list(self._memory.reserve(plan.layout.slot_bytes, count))
            slots = self._found(memories)
            if isinstance(self._memory, OutlivingMemory):
                self._foreign_pins = set(self._memory.pinned())
                slots = tuple(
                    replace(slot, pinned=index in self._foreign_pins)
                    for index, slot in enumerate(slots)
                )
                self._memory.set_orphan_order(self._order_for(StepId(0, 0)))
            with self._lock:
                self._plan, self._memories, self._slots = plan, memories, slots
                self._others_freed = False
            self.report.snapshot_bytes = plan.pack.size_bytes
            self.report.reserved_bytes = sum(map(len, memories))

        outcome = agree(self._collective, "reserved", reserve)
        if outcome.causes:
            raise SaveFailedError(step, outcome.causes) from outcome.error
        digest = hashlib.blake2b("".join(layouts).encode(), digest_size=8).digest()
        self._layout = (int.from_bytes(digest, "little") >> 1) or 1
        return found[0].first

    def _found(self, memories: Collection[ByteArray]) -> rule.Slots:
        """What slots hold that a rank before this one has left."""
        generations = self._directory.generations()
        states = []
        for memory in memories:
            seal = read_seal(memory)
            ours = (
                seal is not None
                and seal.rank == self._collective.rank
                and seal.world_size == self._collective.world_size
                and seal.step_id.generation in generations
                and owner_digest(generations[seal.step_id.generation].owner) == seal.owner
            )
            states.append(SlotState(seal.step_id, sealed=True) if seal and ours else SlotState())
        return rule.adopt(tuple(states), self._restored, self._lineage)

    # -- capturing ----------------------------------------------------------------------------

    def _begin(self, step: int, look: Look, all_sealed: int, flush: bool) -> SaveHandle:
        plan = self._plan
        assert plan is not None
        assert self._owner.generation is not None
        if not self._tells_optimizer:
            look.context.pop("optimizer", None)
        step_id = StepId(self._owner.generation, step)
        with self._lock:
            index = rule.pick(self._slots, all_sealed)
            assert index is not None
            self._set(index, SlotState(step_id, sealed=False, pinned=True))
        memory = self._memories[index]
        unseal(memory)
        handle = SaveHandle(step=step)
        refuse(handle.protected, no_redundancy())
        if not flush:
            refuse(
                handle.durable,
                NotRequested(
                    f"step {step} is in memory only, as its turn to be made durable has not come: "
                    "save(..., durable=True) asks for it"
                ),
            )
        capture = plan.begin(self._copier, memory, look)
        current = _Current(index, step_id, capture, handle, flush)
        current.probes = [(o, self._fences.count(o), f) for o, f in plan.probes]
        self._current = current
        self._do(lambda: self._complete(current))
        self.report.taken += 1
        return handle

    def _set(self, index: int, state: SlotState) -> None:
        self._slots = (*self._slots[:index], state, *self._slots[index + 1 :])

    def _fence(self) -> None:
        """Before an update: whatever is not copied yet is copied now, by this thread, too."""
        self._finish_current()
        self._post()

    def _finish_current(self) -> None:
        current = self._current
        if current is not None and not current.capture.done:
            self.report.stall_s += current.capture.help()

    def _capture_at_once(self) -> None:
        """No optimizer has shown yet that it would wait: copy now."""
        self._finish_current()
        self.report.synchronous += 1
        if self.report.synchronous == 3 and not self._warned_unproven:
            self._warned_unproven = True
            warnings.warn(
                "snapshots are copied while training waits, since no optimizer of the State has "
                "called its step hooks so far: give State(optimizer=...) all optimizers, or call "
                "checkpointer.wait_captured() before tensors change",
                RuntimeWarning,
                stacklevel=5,
            )

    def _check_fenced(self) -> None:
        """Raises StateError where an optimizer has changed tensors without calling its hooks."""
        current, plan = self._current, self._plan
        if current is None or plan is None or not self._fences.proven:
            return
        for optimizer, count, fragment in current.probes:
            if self._fences.count(optimizer) > count or not current.capture.done:
                continue
            if plan.differs(current.capture.slot, fragment):
                self._failed = current.step_id.step
                raise StateError(
                    f"{fragment.spec.name!r} has changed since step {current.step_id.step} was "
                    f"saved, but {type(optimizer).__name__} has not called its step hooks, which "
                    "wait for the copy: call checkpointer.wait_captured() before every change that "
                    "is not a step of an optimizer of the State"
                )

    # -- beside the training ------------------------------------------------------------------

    def _do(self, task: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._work, name="everstep-snapshots", daemon=True
            )
            self._thread.start()
        self._tasks.put(task)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()

    def _complete(self, current: _Current) -> None:
        try:
            self._seal(current)
        except Exception as e:
            with self._lock:
                self._failed = current.step_id.step
                self._set(current.index, SlotState())
            error = e if isinstance(e, CheckpointError) else CheckpointError(describe(e))
            for future in (current.handle.captured, current.handle.durable):
                refuse(future, error)

    def _seal(self, current: _Current) -> None:
        while not current.capture.wait(_WAIT_S):
            if self._closed and not current.capture.done:
                raise CheckpointError(f"step {current.step_id.step} was not captured to its end")
        plan = self._plan
        assert plan is not None
        if not current.handle.captured.done():
            current.handle.captured.set_result(None)
        plan.seal(
            current.capture, current.step_id, owner_digest(self._owner.owner), self._owner.lineage()
        )
        with self._lock:
            self._set(current.index, SlotState(current.step_id, sealed=True, pinned=current.flush))
            self.report.newest_sealed = current.step_id.step
        self._memory.sealed(current.index, self._all_sealed)
        if current.flush:
            self._flush(current)
        if isinstance(self._memory, OutlivingMemory):
            self._memory.tell(asdict(self.report))
            self._look_at_pins(self._memory)

    def _look_at_pins(self, memory: OutlivingMemory) -> None:
        """What readers and flushes of the attempt before still use, they may have let go of."""
        if not self._foreign_pins:
            return
        left = self._foreign_pins & set(memory.pinned())
        with self._lock:
            for index in self._foreign_pins - left:
                self._set(index, replace(self._slots[index], pinned=False))
            self._foreign_pins = left

    def _flush(self, current: _Current) -> None:
        future = self._memory.flush(current.index, self._order_for(current.step_id))
        with self._lock:
            self._flushes.add(future)
        future.add_done_callback(lambda done: self._flushed(current, done))

    def _order_for(self, step_id: StepId) -> FlushOrder:
        return FlushOrder(
            **self._order,
            step_id=step_id,
            rank=self._collective.rank,
            world_size=self._collective.world_size,
        )

    def _flushed(self, current: _Current, future: "Future[Flushed]") -> None:
        error = future.exception()
        step = current.step_id.step
        with self._lock:
            self._flushes.discard(future)
            slot = self._slots[current.index]
            if slot.step_id == current.step_id:
                self._set(current.index, replace(slot, pinned=False))
            if error is None:
                self._durable_step = max(self._durable_step, step)
                self._durable_at_s = time.monotonic()
                self.report.newest_durable = step
                self.report.flushes += 1
                self._outage = False
            else:
                self.report.flushes_failed += 1
                self.report.last_flush_error = str(error)
        if error is None:
            done = future.result()
            current.handle.durable.set_result(
                StepInfo(
                    step=step,
                    generation=current.step_id.generation,
                    path=done.path,
                    size_bytes=done.size_bytes,
                    duration_s=done.duration_s,
                )
            )
            return
        current.handle.durable.set_exception(error)
        if not self._outage:
            self._outage = True
            warnings.warn(
                f"step {step} could not be made durable, training goes on and the next one is "
                f"tried: {error}",
                RuntimeWarning,
                stacklevel=2,
            )


def _settle(future: "Future[Any]", timeout_s: float) -> None:
    try:
        future.exception(timeout_s)
    except TimeoutError:
        return
