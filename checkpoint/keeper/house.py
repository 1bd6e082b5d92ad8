"""Everything that a keeper keeps: slots, flushes, locks, and what is to be done without trainers.

No sockets here. Used by one thread, the keeper's loop.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from everstep.checkpoint.errors import EverstepError, KeeperError
from everstep.checkpoint.keeper import segments
from everstep.checkpoint.keeper.deputy import Deputy, Hold
from everstep.checkpoint.keeper.flushes import Flushes, FlushSlot, Waiter
from everstep.checkpoint.keeper.orphans import is_hopeless, worth_flushing
from everstep.checkpoint.keeper.slots import SetShape, Slot, SlotSet, SlotTable
from everstep.checkpoint.keeper.wire import close_all
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.snapshots.memory import FlushOrder

RESCUE_S = 30.0
"""How long a flush that nobody has asked for waits for the ranks of other nodes: they may hold
other steps, and then it comes to nothing."""

Made = Callable[[SlotSet | Exception], None]


@dataclass(frozen=True)
class _Lock:
    fd: int
    rank: int


class House:
    """The state of a keeper.

    Args:
        deputy: what is to outlive this process is left with it.
        budget_bytes: for all slots.
        flush: makes a snapshot durable.
        post: has the loop call something, from any thread.
        log: takes a line for people.
    """

    def __init__(
        self,
        deputy: Deputy,
        *,
        budget_bytes: int,
        flush: FlushSlot,
        post: Callable[[Callable[[], None]], None],
        log: Callable[[str], None],
    ) -> None:
        self.table = SlotTable(budget_bytes, lambda shape: deputy.drop(f"set/{shape.set_id}"))
        self.flushes = Flushes(flush, post, self._needed)
        self.stats: dict[int, dict[str, Any]] = {}
        self.trainers: dict[int, int] = {}
        """Rank -> process of those that are connected."""
        self.address: str | None = None
        """Of the data plane."""
        self.stopping: str | None = None
        """"flush": save what is there, and end; "now": end."""
        self._began_s = time.monotonic()
        self._deputy = deputy
        self._post = post
        self._log = log
        self._locks: dict[str, _Lock] = {}
        self._making: dict[tuple[int, int, int], list[Made]] = {}
        self._closed = False

    # Slots

    def reserve(self, rank: int, slot_bytes: int, slots: int, made: Made) -> None:
        """Find or make slots for a rank; ``made`` is told, now or later.

        Raises:
            SlotMemoryError: there is no room.
            ValueError: the numbers are none of a slot.
        """
        found = self.table.find(rank, slot_bytes, slots)
        key = (rank, slot_bytes, slots)
        if found is not None:
            self.use(found)
            made(found)
        elif key in self._making:
            self._making[key].append(made)
        else:
            shape = SetShape.new(rank, slot_bytes, slots)
            self.table.promise(shape)
            self._making[key] = [made]
            name = f"prefault-{rank}"
            threading.Thread(target=self._make, args=(shape,), name=name, daemon=True).start()

    def adopt(self, shape: SetShape, fds: list[int], *, current: bool) -> None:
        """Take slots that somebody has held the descriptors of.

        Raises:
            ValueError: they are not what the shape says; the descriptors are closed.
        """
        is_new = self.table.add(shape, fds)
        found = next(s for s in self.table.sets() if s.shape.set_id == shape.set_id)
        if is_new:
            self._deputy.hold(f"set/{shape.set_id}", shape.as_json(), found.fds)
            sealed = sum(slot.seal() is not None for slot in found.slots)
            self._log(f"rank {shape.rank}: {shape.slots} more slots, {sealed} of them sealed")
        if current:
            self.use(found)

    def use(self, found: SlotSet) -> None:
        """A rank has reserved this one."""
        self.table.use(found.shape.set_id)
        self._deputy.note(f"current/{found.shape.rank}", found.shape.set_id)

    def _make(self, shape: SetShape) -> None:
        """In a thread of its own: pages take a while."""
        fds: list[int] = []
        error: Exception | None = None
        try:
            for _ in range(shape.slots):
                fds.append(segments.create(shape.slot_bytes))
                segments.prefault(fds[-1], shape.slot_bytes, wanted=lambda: not self._closed)
        except (EverstepError, OSError) as e:
            close_all(fds)
            error = e
        self._post(lambda: self._made(shape, fds, error))

    def _made(self, shape: SetShape, fds: list[int], error: Exception | None) -> None:
        if self._closed:
            close_all(fds)
            return
        waiting = self._making.pop((shape.rank, shape.slot_bytes, shape.slots))
        self.table.break_promise(shape)
        try:
            if error is None:
                self.adopt(shape, fds, current=True)
        except (OSError, ValueError) as e:
            error = e
        found = self.table.current(shape.rank)
        for made in waiting:
            made(error or found or KeeperError("the slots were freed while they were made"))

    def free_surpassed(self) -> None:
        """Free what ranks that are not here any more have, where all ranks have newer snapshots."""
        self.table.free_surpassed(set(self.trainers), self.all_sealed)

    # What is sealed, as trainers say

    @property
    def all_sealed(self) -> StepId | None:
        """A snapshot that all ranks have sealed: the one that was told last.

        Not the newest that was ever told, which may be of a run that was begun anew since.
        """
        told = self._deputy.notes.get("all_sealed")
        return None if told is None else StepId(*told)

    def tell_all_sealed(self, step_id: StepId) -> None:
        """Take note of it."""
        self._deputy.note("all_sealed", list(step_id))

    # Flushes

    def flush(self, slot: Slot, order: FlushOrder, waiter: Waiter | None = None) -> None:
        """See ``Flushes.start``."""
        self.flushes.start(slot, order, waiter)

    def set_orphan_order(self, rank: int, order: FlushOrder) -> None:
        """How to flush a rank's snapshot when there are no trainers."""
        self._deputy.note(f"orphan/{rank}", order.as_json())

    def rescue(self) -> None:
        """Flush what would be lost if this keeper ended now, at full speed."""
        self._flush_ordered()
        held = [(slot, seal) for slot in self.table.slots() if (seal := slot.seal()) is not None]
        seals = dict(held)
        here = {slot.shape.rank for slot in self.table.slots()}
        self.flushes.cancel(lambda order: is_hopeless(order, here, seals.values()))
        chosen, why = worth_flushing(held, self.all_sealed)
        if held:
            self._log(why)
        for slot in chosen:  # those that were overwritten meanwhile are refused
            rank, seal = slot.shape.rank, seals[slot]
            coded = self._deputy.notes.get(f"orphan/{rank}")
            if coded is None:
                self._log(f"rank {rank} has not said where its snapshots belong: not flushed")
                continue
            order = replace(
                FlushOrder.from_json(coded),
                step_id=seal.step_id,
                rank=rank,
                world_size=seal.world_size,
                rate_bytes_per_s=None,
                deadline_s=RESCUE_S,
            )
            self._try_to_flush(slot, order)

    def _flush_ordered(self) -> None:
        """Go on with flushes that an earlier keeper had begun, and whose ranks are gone."""
        for noted in self._deputy.noted("flush/").values():
            slot = self.table.slot(noted["set_id"], noted["index"])
            if slot is not None:
                self._try_to_flush(slot, FlushOrder.from_json(noted["order"]))

    def _try_to_flush(self, slot: Slot, order: FlushOrder) -> None:
        def tell(outcome: object) -> None:
            how = f"failed: {outcome}" if isinstance(outcome, Exception) else "is durable"
            self._log(f"step {order.step_id.step} of rank {order.rank} {how}")

        try:
            self.flushes.start(slot, order, tell)
        except TypeError as error:  # an order that is none
            self._log(f"step {order.step_id.step} of rank {order.rank} is not flushed: {error}")

    def _needed(self, slot: Slot, order: FlushOrder, needed: bool) -> None:
        note = {"set_id": slot.shape.set_id, "index": slot.index, "order": order.as_json()}
        name = f"flush/{order.step_id.generation}/{order.step_id.step}/{order.rank}"
        self._deputy.note(name, note if needed else None)
        if needed:
            self.table.pin(slot)
        else:
            self.table.unpin(slot)

    # Locks

    def take_lock(self, directory: str, fd: int, rank: int) -> None:
        """Hold the lock of a directory as long as something may be written to it."""
        known = self._locks.get(directory)
        if known is not None and os.path.sameopenfile(known.fd, fd) and known.rank == rank:
            os.close(known.fd)
        elif known is not None:
            self._drop_lock(directory)
        self._locks[directory] = _Lock(fd, rank)
        self._deputy.hold(f"lock/{directory}", {"directory": directory, "rank": rank}, [fd])

    def lock_of(self, directory: str) -> int | None:
        """The descriptor that holds a directory's lock."""
        found = self._locks.get(directory)
        return None if found is None else found.fd

    def release_locks(self, rank: int | None = None) -> None:
        """Let go of the locks that a rank has lent; None: of all."""
        for directory, lock in list(self._locks.items()):
            if rank is None or lock.rank == rank:
                self._drop_lock(directory)

    def _drop_lock(self, directory: str) -> None:
        os.close(self._locks.pop(directory).fd)
        self._deputy.drop(f"lock/{directory}")

    # Life

    def finish(self, rank: int) -> None:
        """A rank has ended as it should: nothing of it is needed any more."""
        self.table.free_rank(rank)
        self.release_locks(rank)
        self.stats.pop(rank, None)
        for key in (f"orphan/{rank}", f"current/{rank}"):
            self._deputy.note(key, None)

    def inherit(self) -> None:
        """Take what the keeper before this one has left with the supervisor.

        Raises:
            EOFError: the supervisor is gone.
        """
        for key, meta, fds in self._deputy.inherit():
            if key.startswith("lock/"):
                self._locks[meta["directory"]] = _Lock(fds[0], meta["rank"])
                continue
            shape = SetShape.from_json(meta)
            try:
                self.table.add(shape, fds)
            except (OSError, ValueError) as error:
                self._log(f"rank {shape.rank}: {shape.slots} slots are lost: {error}")
                continue
            self._log(f"rank {shape.rank}: {shape.slots} slots of the keeper before this one")
            if self._deputy.notes.get(f"current/{shape.rank}") == shape.set_id:
                self.table.use(shape.set_id)

    def stop(self, how: str) -> None:
        """Ask the loop to end; "now" beats "flush"."""
        self.stopping = "now" if "now" in (how, self.stopping) else how

    def status(self) -> dict[str, Any]:
        """For people and programs; the keys are part of the interface."""
        now_s = time.monotonic()
        return {
            "pid": os.getpid(),
            "uptime_s": round(now_s - self._began_s, 3),
            "memory_bytes": self.table.size_bytes,
            "budget_bytes": self.table.budget_bytes,
            "address": self.address,
            "supervised": self._deputy.channel is not None,
            "trainers": [{"rank": rank, "pid": pid} for rank, pid in sorted(self.trainers.items())],
            "slots": [_slot_status(slot, now_s) for slot in self.table.slots()],
            "flushes": self.flushes.status(),
            "counters": {str(rank): stats for rank, stats in sorted(self.stats.items())},
        }

    def holds(self) -> Iterator[Hold]:
        """All descriptors, for another supervisor."""
        for each in self.table.sets():
            yield f"set/{each.shape.set_id}", each.shape.as_json(), each.fds
        for directory, lock in self._locks.items():
            yield f"lock/{directory}", {"directory": directory, "rank": lock.rank}, [lock.fd]

    def close(self) -> None:
        """Let go of everything."""
        self._closed = True
        self.flushes.cancel()
        self.release_locks()
        self.table.close()


def _slot_status(slot: Slot, now_s: float) -> dict[str, Any]:
    seal = slot.seal()
    told_s = slot.sealed_at_s
    return {
        "rank": slot.shape.rank,
        "index": slot.index,
        "bytes": slot.shape.slot_bytes,
        "step": None if seal is None else seal.step_id.step,
        "generation": None if seal is None else seal.step_id.generation,
        "sealed": seal is not None,
        "pinned": slot.pins > 0,
        "age_s": None if seal is None or told_s is None else round(now_s - told_s, 3),
    }
