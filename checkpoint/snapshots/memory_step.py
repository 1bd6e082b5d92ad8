"""A snapshot that is whole in the memory of its ranks, as a checkpoint to be read (no torch).

The parts of all ranks make the manifest, as they do in a checkpoint directory. Slots in the memory
of this process are read in place, those of other nodes by ranges; every block that is touched is
verified, as in files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from everstep.checkpoint.assembly import Assembly
from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.errors import CheckpointError, ManifestChecksumError, ManifestError
from everstep.checkpoint.kernels import crc32c
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.manifest import Manifest, Part, lineage_of
from everstep.checkpoint.pack import PackRecord
from everstep.checkpoint.pack_files import MemoryFile
from everstep.checkpoint.pack_reader import PackReader
from everstep.checkpoint.snapshots.slot_format import Seal, pack_of
from everstep.checkpoint.step_reader import StepReader


class RemoteMemory(Protocol):
    """Slots on another node; ``keeper.remote_slots.RemoteSlots`` is one."""

    @property
    def address(self) -> str:
        """Where they are, for people and messages."""
        ...

    def read_into(self, rank: int, step_id: StepId, offset: int, destination: ByteArray) -> None:
        """Fill an array with bytes of a slot; raises CheckpointError. Threads may share it."""
        ...


@dataclass(frozen=True, kw_only=True)
class HeldSlot:
    """The sealed slot of one rank."""

    seal: Seal
    part: bytes
    memory: ByteArray | RemoteMemory
    """All bytes of the slot, which stay as they are while they are read; or where it is."""


class MemoryStep:
    """A snapshot: the slots of all its ranks. It is what a ``StepReader`` needs of a folder.

    Args:
        slots: one of each rank, in any order.
        assembly: keeps what follows from the layout for the next snapshot; None: nothing is kept.

    Raises:
        CheckpointError: the slots are not one whole snapshot.
        ManifestError: a part is damaged, or does not belong to its slot.
        LayoutError: the parts do not hold each tensor exactly once.
    """

    path = None

    def __init__(self, slots: Sequence[HeldSlot], *, assembly: Assembly | None = None) -> None:
        ordered = sorted(slots, key=lambda held: held.seal.rank)
        _check_whole([held.seal for held in ordered])
        self.step_id = ordered[0].seal.step_id
        self.where = f"the memory of keepers (step {self.step_id.step})"
        """For people and messages."""
        assembly = assembly or Assembly()
        named = [(self._place(held), held) for held in ordered]
        for where, held in named:
            if crc32c(held.part) != held.seal.part_crc32c:
                raise ManifestChecksumError(
                    where, "its part has another checksum than its seal says"
                )
        parts = assembly.parts((where, held.part) for where, held in named)
        for (where, held), part in zip(named, parts, strict=True):
            _check_part(where, held.seal, part)
        self._slots = {part.pack.file: held for part, held in zip(parts, ordered, strict=True)}
        if len(self._slots) != len(parts):
            raise ManifestError(self.where, "two ranks have packs of the same name")
        try:
            self.manifest: Manifest = assembly.manifest(parts, lineage_of(parts[0], named[0][0]))
        except (KeyError, TypeError) as e:
            raise ManifestError(named[0][0], f"its part is none of rank 0: {e!r}") from None

    @property
    def is_here(self) -> bool:
        """Whether all slots are in the memory of this process."""
        return all(isinstance(held.memory, np.ndarray) for held in self._slots.values())

    def reader(self, *, threads: int = 1, in_place: bool | None = None) -> StepReader:
        """Reads the tensors; the slots must stay while it is open.

        Args:
            threads: copy threads.
            in_place: read packs where they are; else they are fetched by ranges, so that ranks
                which load together fetch each byte once. All of these must say the same: it needs
                all slots to be here, on every one of them. None: if they are here.
        """
        if self.is_here if in_place is None else in_place:

            def open_pack(record: PackRecord) -> PackReader:
                where, data = self.describe(record.file), self._view(record.file)
                file = MemoryFile(where, data, record.size_bytes)
                return PackReader(where, record, threads=threads, file=file)

            return StepReader(self, self.manifest, threads=threads, open_pack=open_pack)
        return StepReader(self, self.manifest, threads=threads)

    def describe(self, name: str) -> str:
        """Whose slot has a pack."""
        return self._place(self._slots[name])

    def size(self, name: str) -> int | None:
        """Size of a pack in bytes."""
        return self._slots[name].seal.pack_bytes

    def read(self, name: str, offset: int, length: int) -> ByteArray:
        """Bytes of a pack, in place where they are here; raises CheckpointError."""
        held = self._slots[name]
        if isinstance(held.memory, np.ndarray):
            return self._view(name)[offset : offset + length]
        seal = held.seal
        data = np.empty(max(0, min(length, seal.pack_bytes - offset)), np.uint8)
        held.memory.read_into(seal.rank, seal.step_id, seal.pack_start + offset, data)
        return data

    def _view(self, name: str) -> ByteArray:
        held = self._slots[name]
        if not isinstance(held.memory, np.ndarray):
            raise CheckpointError(
                f"{self.describe(name)} is not in the memory of this process: it cannot be read "
                "in place, only by ranges"
            )
        return pack_of(held.memory, held.seal)

    def _place(self, held: HeldSlot) -> str:
        at = "" if isinstance(held.memory, np.ndarray) else f", at {held.memory.address}"
        return (
            f"rank {held.seal.rank}'s slot in the memory of keepers (step {self.step_id.step}{at})"
        )


def _check_whole(seals: Sequence[Seal]) -> None:
    found = {(seal.step_id, seal.world_size, seal.owner) for seal in seals}
    if len(found) > 1:
        steps = sorted({str(tuple(step_id)) for step_id, _, _ in found})
        raise CheckpointError(
            f"slots of different snapshots (generation, step) {', '.join(steps)}: expected those "
            "of one; choose one"
        )
    ranks = [seal.rank for seal in seals]
    if not seals or ranks != list(range(seals[0].world_size)):
        whole = f" {seals[0].world_size}, of step {seals[0].step_id.step}" if seals else ""
        raise CheckpointError(
            f"slots of ranks {ranks}: expected one of each of all{whole}; choose another snapshot"
        )


def _check_part(where: str, seal: Seal, part: Part) -> None:
    told = (StepId(part.generation, part.step), part.rank, part.world_size)
    if told != (seal.step_id, seal.rank, seal.world_size):
        raise ManifestError(where, f"its part is of {told}, not of what its seal says")
    if part.pack.extents is not None or part.pack.size_bytes != seal.pack_bytes:
        raise ManifestError(
            where,
            f"its part tells of a pack of {part.pack.size_bytes} bytes ({part.pack.kind}), its "
            f"seal of one of {seal.pack_bytes} (safetensors)",
        )
