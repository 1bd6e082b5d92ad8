"""Sealed slots in plain memory, and keepers' data planes that serve them."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np

from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.errors import KeeperError
from everstep.checkpoint.kernels import crc32c
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.manifest import Part, encode_part
from everstep.checkpoint.pack import PackPlan, plan_pack, stream_pack
from everstep.checkpoint.snapshots.slot_format import (
    Seal,
    owner_digest,
    part_of,
    read_seal,
    slot_layout,
    write_seal,
)
from tests.support.written_steps import Cut, part_of_rank, share_out, source_in


class SlotWriter:
    """A StoreWriter into memory of exactly the size of what is written."""

    def __init__(self, target: ByteArray) -> None:
        self._target, self._done = target, 0

    def space(self) -> ByteArray:
        return self._target[self._done :]

    def advance(self, count: int) -> None:
        self._done += count

    def append(self, data: bytes | ByteArray) -> None:
        self._target[self._done : self._done + len(data)] = np.frombuffer(data, np.uint8)
        self._done += len(data)

    def finish(self) -> int:
        assert self._done == len(self._target)
        return self._done

    def __enter__(self) -> "SlotWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


def sealed_slots(cuts: Mapping[str, Cut], *, step: int = 1, seed: int = 0) -> list[ByteArray]:
    """The snapshot of the step that ``write_step`` writes: for each rank its slot."""
    plans = [plan_pack(rank, held) for rank, held in enumerate(share_out(cuts, seed))]
    return [_sealed(plan, cuts, len(plans), step) for plan in plans]


def slot_of(data: bytes, part: Part) -> ByteArray:
    """A sealed slot with the bytes of a pack and its part."""
    coded = encode_part(part)
    layout = slot_layout(len(data), len(coded))
    slot = np.zeros(layout.slot_bytes, np.uint8)
    slot[layout.pack_start : layout.pack_start + len(data)] = np.frombuffer(data, np.uint8)
    seal = Seal(
        step_id=StepId(part.generation, part.step),
        rank=part.rank,
        world_size=part.world_size,
        owner=owner_digest("tests"),
        part_start=layout.part_start,
        part_bytes=len(coded),
        pack_start=layout.pack_start,
        pack_bytes=len(data),
        part_crc32c=crc32c(coded),
    )
    write_seal(slot, coded, seal)
    return slot


def seal_and_part(slot: ByteArray) -> tuple[Seal, bytes]:
    """What a sealed slot says of itself."""
    seal = read_seal(slot)
    assert seal is not None
    return seal, part_of(slot, seal)


@dataclass
class FakeSlots:
    """Slots as a keeper has them; counts how often one is pinned at the moment."""

    slots: dict[tuple[int, StepId], ByteArray] = field(default_factory=dict)
    pinned: int = 0
    asked: list[tuple[int, StepId]] = field(default_factory=list)
    """For which somebody has asked."""

    def sealed(self) -> list[tuple[int, StepId]]:
        """Which there are."""
        return list(self.slots)

    @contextlib.contextmanager
    def read(self, rank: int, step_id: StepId) -> Iterator[ByteArray]:
        """One of them."""
        self.asked.append((rank, step_id))
        slot = self.slots.get((rank, step_id))
        if slot is None:
            raise KeeperError(f"rank {rank} has no sealed slot of step {step_id.step}")
        self.pinned += 1
        try:
            yield slot
        finally:
            self.pinned -= 1


def _sealed(plan: PackPlan, cuts: Mapping[str, Cut], world_size: int, step: int) -> ByteArray:
    data = np.zeros(plan.size_bytes, np.uint8)
    with SlotWriter(data) as out:
        record = stream_pack(out, f"rank-{plan.rank:05d}-ab.safetensors", plan, source_in(cuts))
    return slot_of(
        data.tobytes(), part_of_rank(plan.rank, world_size, step, record, plan.fragments)
    )
