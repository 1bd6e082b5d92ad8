"""The slots of one rank and what they hold, as the threads of the engine change it."""

import threading
from collections.abc import Sequence
from dataclasses import replace

from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.snapshots import slots as rule
from everstep.checkpoint.snapshots.slot_format import unseal
from everstep.checkpoint.snapshots.slots import NOTHING, Slots, SlotState


class SlotBoard:
    """Applies the release rule (``slots.py``) to memory. Thread-safe.

    Args:
        memories: of each slot.
        slots: what they hold.
    """

    def __init__(self, memories: Sequence[ByteArray], slots: Slots) -> None:
        self._memories, self._slots = tuple(memories), slots
        self._lock = threading.Lock()

    @property
    def slots(self) -> Slots:
        """What is held now."""
        with self._lock:
            return self._slots

    def memory(self, index: int) -> ByteArray:
        """The bytes of a slot."""
        return self._memories[index]

    def is_of(self, memories: Sequence[ByteArray]) -> bool:
        """Whether these are its slots."""
        places = [[m.ctypes.data for m in slots] for slots in (memories, self._memories)]
        return places[0] == places[1]

    def adopt(self, restored: StepId | None) -> None:
        """The run goes on from an earlier step (``slots.adopt``)."""
        with self._lock:
            self._slots = rule.adopt(self._slots, restored)

    def begin(self, step_id: StepId, all_sealed: int) -> int:
        """Take a slot for a capture; all ranks have sealed ``all_sealed``."""
        with self._lock:
            index = rule.pick(self._slots, all_sealed)
            if index is None:
                raise RuntimeError(f"no slot for {step_id}, though all ranks decided for it")
            self._set(index, SlotState(step_id, sealed=False, pinned=True))
        unseal(self._memories[index])
        return index

    def holds(self, index: int, step_id: StepId) -> bool:
        """Whether a capture still counts: no rank has failed to capture its step."""
        with self._lock:
            return self._slots[index].step_id == step_id

    def seal(self, index: int, step_id: StepId, *, pinned: bool) -> None:
        """A capture is complete; it stays pinned where a flush follows."""
        with self._lock:
            if self._slots[index].step_id == step_id:
                self._set(index, SlotState(step_id, sealed=True, pinned=pinned))
            else:
                self._set(index, replace(self._slots[index], pinned=False))

    def give_up(self, index: int) -> None:
        """A capture came to nothing."""
        with self._lock:
            self._set(index, SlotState())

    def unpin(self, index: int) -> None:
        """A use of a slot has ended."""
        with self._lock:
            self._set(index, replace(self._slots[index], pinned=False))

    def forget(self, step: int) -> None:
        """A rank has failed to capture a step: it counts no more."""
        with self._lock:
            for index, slot in enumerate(self._slots):
                if slot.step_id is not None and slot.step_id.step == step:
                    unseal(self._memories[index])
            self._slots = rule.forget(self._slots, step)

    def sealed_as(self, step: int) -> StepId | None:
        """The identity of a step that this rank has sealed."""
        with self._lock:
            for slot in self._slots:
                if slot.sealed and slot.step_id is not None and slot.step_id.step == step:
                    return slot.step_id
        return None

    def may_capture(self) -> bool:
        """Whether nothing of this rank is in the way of a capture."""
        slots = self.slots
        return rule.capture_needs(slots) <= max(rule.newest_sealed(slots), NOTHING)

    def _set(self, index: int, state: SlotState) -> None:
        self._slots = (*self._slots[:index], state, *self._slots[index + 1 :])
