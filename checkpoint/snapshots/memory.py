"""What the snapshot engine of one rank needs of the memory that it captures into.

Two implementations: memory of the own process (``arena.py``), which ends with it, and that of a
keeper (``checkpoint.keeper.client``), which outlives it. ``tests/contracts/test_slot_memory.py``
holds for both.
"""

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.snapshots.slot_format import Seal


@dataclass(frozen=True, kw_only=True)
class FlushOrder:
    """Make the snapshot in a slot durable: write its pack, vote, and see that it is committed.

    Plain data that can be sent as JSON (``as_json``).
    """

    directory: str
    """Absolute path or URL of the checkpoint directory."""
    step_id: StepId
    rank: int
    world_size: int
    keep: int
    """How many checkpoints to keep, for rank 0, which commits."""
    rate_bytes_per_s: float | None = None
    """How fast to write at most; None: as fast as it goes."""
    deadline_s: float = 600.0
    """How long the votes of other ranks, and the commit, are waited for."""
    storage_options: Mapping[str, Any] | None = None
    """For the file system of a URL."""
    single_writer: bool = False

    def as_json(self) -> dict[str, Any]:
        """Members that JSON can carry."""
        return asdict(self)

    @classmethod
    def from_json(cls, coded: Mapping[str, Any]) -> "FlushOrder":
        """Inverse of ``as_json``; raises TypeError or ValueError."""
        generation, step = coded["step_id"]
        return cls(**{**coded, "step_id": StepId(int(generation), int(step))})


@dataclass(frozen=True, kw_only=True)
class Flushed:
    """A snapshot that is durable."""

    step_id: StepId
    path: str
    size_bytes: int
    """Of the whole checkpoint."""
    duration_s: float
    warning: str | None = None
    """What went wrong after the commit, on rank 0: older checkpoints could not be deleted."""


class SlotMemory(Protocol):
    """Slots of one rank. Thread-safe."""

    def reserve(self, slot_bytes: int, slots: int) -> Sequence[ByteArray]:
        """Memory for snapshots, mapped and backed by pages; what it holds stays.

        Called again with the same numbers it gives the same slots, with what they hold, also to a
        process that has taken the place of one that died. With others, new ones are made; the old
        ones stay, readable, until ``free_others``.

        Raises:
            SlotMemoryError: there is not enough memory, or a budget forbids it.
        """
        ...

    def free_others(self) -> None:
        """Free all slots of this rank, and of ranks that are no more, but the reserved ones."""
        ...

    def sealed(self, index: int, all_sealed: StepId | None) -> None:
        """Tell that slot ``index`` was sealed just now.

        Args:
            index: of the slot.
            all_sealed: the newest snapshot that is known to be sealed on all ranks.
        """
        ...

    def flush(self, index: int, order: FlushOrder) -> "Future[Flushed]":
        """Make the snapshot in a sealed slot durable; the slot is not to be touched meanwhile.

        The future resolves when the checkpoint is committed, on every rank, or fails with an error
        that says which rank failed and why (SaveFailedError), or another OSError or EverstepError.
        """
        ...

    def close(self, *, finished: bool = True) -> None:
        """Wait for flushes that were begun; let go of the memory; may be called twice.

        Args:
            finished: False: the process ends because of an error: what is held is to be kept for
                the next one, where that is possible.
        """
        ...


class Holding(Protocol):
    """A sealed slot of this node; it stays until it is released."""

    @property
    def seal(self) -> Seal:
        """What it holds."""
        ...

    @property
    def part(self) -> bytes:
        """The vote of its rank."""
        ...

    @property
    def memory(self) -> ByteArray:
        """The whole slot."""
        ...

    def release(self) -> None:
        """The slot may be freed; may be called twice."""
        ...


@runtime_checkable
class OutlivingMemory(SlotMemory, Protocol):
    """Memory that outlives the trainers: that of a keeper."""

    @property
    def name(self) -> str:
        """Which keeper it is: no two have the same."""
        ...

    def holdings(self) -> "Sequence[Holding]":
        """Everything that is sealed on this node; release each of them."""
        ...

    def pinned(self) -> Collection[int]:
        """Reserved slots that somebody else is reading: not to be captured into."""
        ...

    def flushing(self) -> Collection[StepId]:
        """Snapshots that are being written: what there is of them on disk is no garbage."""
        ...

    def set_orphan_order(self, order: FlushOrder) -> None:
        """How to flush a snapshot of this rank when all trainers have vanished."""
        ...

    def lend_lock(self, directory: str, fd: int) -> None:
        """Hold the lock of a checkpoint directory for as long as it may be written to."""
        ...

    def borrowed_lock(self, directory: str) -> int | None:
        """A new descriptor that holds this lock; None if there is none."""
        ...

    def address(self) -> str | None:
        """'host:port' where other nodes may read, None where they may not."""
        ...

    def token(self) -> bytes:
        """The secret that lets them."""
        ...

    def tell(self, stats: Mapping[str, Any]) -> None:
        """Numbers of this rank, to be shown to people."""
        ...
