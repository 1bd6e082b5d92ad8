"""Which slots a keeper has: whose they are, who needs them, and what may be freed.

A *set* is what one rank has reserved at once: slots of one size. Sets are adopted and freed whole.
"""

import itertools
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.errors import SlotMemoryError
from everstep.checkpoint.host_memory import least_room_bytes
from everstep.checkpoint.json_checks import natural, text
from everstep.checkpoint.keeper import segments
from everstep.checkpoint.keeper.wire import close_all
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.snapshots.slot_format import PAGE_BYTES, Seal, read_seal

MAX_SLOTS = 64


@dataclass(frozen=True, kw_only=True)
class SetShape:
    """What a set is, as all processes that hold its descriptors know it."""

    set_id: str
    rank: int
    slot_bytes: int
    slots: int

    @property
    def size_bytes(self) -> int:
        """Of all slots."""
        return self.slot_bytes * self.slots

    def as_json(self) -> dict[str, Any]:
        """Members that JSON can carry."""
        return vars(self).copy()

    @classmethod
    def from_json(cls, coded: Mapping[str, Any]) -> "SetShape":
        """Inverse of ``as_json``; raises ValueError."""
        slots, slot_bytes = natural(coded.get("slots")), natural(coded.get("slot_bytes"))
        if not 1 <= slots <= MAX_SLOTS:
            raise ValueError(f"{slots} slots were asked for, expected 1 to {MAX_SLOTS}")
        if slot_bytes < PAGE_BYTES or slot_bytes % PAGE_BYTES:
            raise ValueError(f"a slot of {slot_bytes} bytes is no multiple of {PAGE_BYTES}")
        return cls(
            set_id=text(coded.get("set_id")),
            rank=natural(coded.get("rank")),
            slot_bytes=slot_bytes,
            slots=slots,
        )

    @classmethod
    def new(cls, rank: int, slot_bytes: int, slots: int) -> "SetShape":
        """One that no other is equal to. Raises ValueError."""
        given = {"rank": rank, "slot_bytes": slot_bytes, "slots": slots}
        return cls.from_json({**given, "set_id": secrets.token_hex(8)})


@dataclass(eq=False, kw_only=True)
class Slot:
    """Memory for one snapshot."""

    shape: SetShape
    index: int
    fd: int
    memory: ByteArray
    """Read-only here."""
    pins: int = 0
    """How many need what is in it."""
    sealed_at_s: float | None = None
    """When its rank told that it was sealed."""

    def seal(self) -> Seal | None:
        """What it holds, as its memory says."""
        seal = read_seal(self.memory)
        return seal if seal is not None and seal.rank == self.shape.rank else None


@dataclass(eq=False, kw_only=True)
class SlotSet:
    """The slots of a rank, of one size."""

    shape: SetShape
    slots: list[Slot] = field(default_factory=list)
    doomed: bool = False
    """To be freed as soon as nobody needs it."""

    @property
    def fds(self) -> list[int]:
        """Descriptors, in order of the index."""
        return [slot.fd for slot in self.slots]


class SlotTable:
    """All slots of a keeper.

    Args:
        budget_bytes: how much memory they may take together.
        freed: is told of each set whose memory was let go.
        available_bytes: how much memory the host has left.
    """

    def __init__(
        self,
        budget_bytes: int,
        freed: Callable[[SetShape], None],
        *,
        available_bytes: Callable[[], int] = least_room_bytes,
    ) -> None:
        self.budget_bytes = budget_bytes
        self._freed = freed
        self._available_bytes = available_bytes
        self._sets: dict[str, SlotSet] = {}
        self._current: dict[int, str] = {}
        self._promised: dict[str, SetShape] = {}

    @property
    def size_bytes(self) -> int:
        """Of all slots, those included that are being made."""
        made = (each.shape.size_bytes for each in self._sets.values())
        return sum(made) + sum(shape.size_bytes for shape in self._promised.values())

    def promise(self, shape: SetShape) -> None:
        """Keep room for a set that is about to be made.

        Raises:
            SlotMemoryError: the budget, or the host, has no room for it.
        """
        left = self.budget_bytes - self.size_bytes
        if shape.size_bytes > left:
            raise SlotMemoryError(
                f"rank {shape.rank} asks for {shape.slots} slots of {shape.slot_bytes} bytes, "
                f"{shape.size_bytes} bytes together, and the keeper has {max(0, left)} left of its "
                f"budget of {self.budget_bytes}: start it with a larger --memory-budget, or keep "
                "fewer snapshots in memory"
            )
        coming = sum(promised.size_bytes for promised in self._promised.values())
        available = self._available_bytes() - coming
        if shape.size_bytes > available:
            raise SlotMemoryError(
                f"rank {shape.rank} asks for {shape.slots} slots of {shape.slot_bytes} bytes, "
                f"{shape.size_bytes} bytes together, and this host (or the job's control group) "
                f"has {max(0, available)} available: keep fewer snapshots in memory, or give the "
                "job more"
            )
        self._promised[shape.set_id] = shape

    def break_promise(self, shape: SetShape) -> None:
        """The set was not made, or is added now."""
        self._promised.pop(shape.set_id, None)

    def add(self, shape: SetShape, fds: Sequence[int]) -> bool:
        """Take a set, and its descriptors, which are closed where it is here already.

        Returns:
            True where it is new here.

        Raises:
            ValueError: the descriptors are not what the shape says; they are closed.
        """
        try:
            if shape.set_id in self._sets:
                close_all(fds)
                return False
            if len(fds) != shape.slots or any(segments.check(f) != shape.slot_bytes for f in fds):
                raise ValueError(f"what was offered is not {shape.slots} slots of one size")
            slots = [
                Slot(shape=shape, index=i, fd=fd, memory=segments.map_slot(fd, writable=False))
                for i, fd in enumerate(fds)
            ]
        except BaseException:
            close_all(fds)
            raise
        self.break_promise(shape)
        self._sets[shape.set_id] = SlotSet(shape=shape, slots=slots)
        return True

    def use(self, set_id: str) -> None:
        """From now on a set is the one that its rank has reserved."""
        found = self._sets[set_id]
        found.doomed = False
        self._current[found.shape.rank] = set_id

    def current(self, rank: int) -> SlotSet | None:
        """What a rank has reserved."""
        return self._sets.get(self._current.get(rank, ""))

    def find(self, rank: int, slot_bytes: int, slots: int) -> SlotSet | None:
        """A set of a rank with these numbers: the one in use first, else the youngest."""
        wanted = (rank, slot_bytes, slots)
        fitting = [
            each
            for each in self._sets.values()
            if (each.shape.rank, each.shape.slot_bytes, each.shape.slots) == wanted
        ]
        current = self.current(rank)
        return current if current in fitting else (fitting[-1] if fitting else None)

    def slot(self, set_id: str, index: int) -> Slot | None:
        """One slot."""
        found = self._sets.get(set_id)
        return found.slots[index] if found and 0 <= index < len(found.slots) else None

    def sets(self) -> list[SlotSet]:
        """All of them."""
        return list(self._sets.values())

    def slots(self) -> Iterator[Slot]:
        """All of them."""
        return itertools.chain.from_iterable(each.slots for each in self.sets())

    def pin(self, slot: Slot) -> None:
        """Somebody needs what a slot holds."""
        slot.pins += 1

    def unpin(self, slot: Slot) -> None:
        """And does not any more."""
        slot.pins -= 1
        self._sweep()

    def free_others(self, rank: int) -> None:
        """Free what a rank has but what it has reserved last."""
        for each in self._sets.values():
            if each.shape.rank == rank and each.shape.set_id != self._current.get(rank):
                each.doomed = True
        self._sweep()

    def free_surpassed(self, alive: set[int], all_sealed: StepId | None) -> None:
        """Free what ranks that are no more here have, if all of it is older than a snapshot.

        Args:
            alive: ranks whose processes are connected.
            all_sealed: the newest snapshot that all ranks have sealed; None: frees nothing.
        """
        if all_sealed is None:
            return
        for each in self._sets.values():
            seals = [slot.seal() for slot in each.slots]
            old = all(seal is None or seal.step_id < all_sealed for seal in seals)
            if each.shape.rank not in alive and old:
                each.doomed = True
                self._current.pop(each.shape.rank, None)
        self._sweep()

    def free_rank(self, rank: int) -> None:
        """Free all that a rank has."""
        self._current.pop(rank, None)
        self.free_others(rank)

    def close(self) -> None:
        """Free everything, needed or not."""
        for each in self.sets():
            self._free(each)

    def _sweep(self) -> None:
        for each in self.sets():
            if each.doomed and not any(slot.pins for slot in each.slots):
                self._free(each)

    def _free(self, each: SlotSet) -> None:
        del self._sets[each.shape.set_id]
        close_all(each.fds)
        for slot in each.slots:  # whoever reads it still has a reference of his own
            del slot.memory
        self._freed(each.shape)
