"""The bytes of a slot: memory for one snapshot of one rank (pure).

::

    seal, 4096 bytes | part, padded to 4096 | pack, exactly the bytes that its file will have

The seal is written last and zeroed first: a slot holds a snapshot if and only if its seal is whole.
The part is the vote that a rank would put into a checkpoint directory (``manifest.encode_part``),
so that whoever sees the sealed slots of all ranks has a checkpoint: its parts and its packs.
"""

import hashlib
import struct
from dataclasses import dataclass

import numpy as np

from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.errors import CheckpointError
from everstep.checkpoint.kernels import crc32c
from everstep.checkpoint.lineage import StepId

PAGE_BYTES = 4096
_MAGIC = b"evrsteps"
_VERSION = 1
_SEAL = struct.Struct("<8sIIQQIIQQQQI16s")
_CRC = struct.Struct("<I")


@dataclass(frozen=True, kw_only=True)
class SlotLayout:
    """Where everything is in a slot; a function of two sizes."""

    pack_bytes: int
    """Size of the pack, header and checksum table included."""
    part_capacity_bytes: int
    """Room for the part; a multiple of ``PAGE_BYTES``."""

    @property
    def part_start(self) -> int:
        """Byte offset of the part."""
        return PAGE_BYTES

    @property
    def pack_start(self) -> int:
        """Byte offset of the pack; a multiple of ``PAGE_BYTES``."""
        return PAGE_BYTES + self.part_capacity_bytes

    @property
    def slot_bytes(self) -> int:
        """Size of the slot; a multiple of ``PAGE_BYTES``."""
        return self.pack_start + round_up(self.pack_bytes)


@dataclass(frozen=True, kw_only=True)
class Seal:
    """What a sealed slot holds."""

    step_id: StepId
    rank: int
    world_size: int
    owner: bytes
    """``owner_digest`` of the generation, so that equal numbers of two runs are told apart."""
    part_start: int
    part_bytes: int
    pack_start: int
    pack_bytes: int
    part_crc32c: int


class PartTooLargeError(CheckpointError):
    """The plain state of objects has outgrown its slot."""


def round_up(n_bytes: int) -> int:
    """The next multiple of ``PAGE_BYTES``."""
    return -(-n_bytes // PAGE_BYTES) * PAGE_BYTES


def slot_layout(pack_bytes: int, part_bytes: int) -> SlotLayout:
    """A layout for packs of a size and parts that may grow to twice a size, and some."""
    return SlotLayout(
        pack_bytes=pack_bytes, part_capacity_bytes=round_up(2 * part_bytes + 16 * PAGE_BYTES)
    )


def owner_digest(owner: str) -> bytes:
    """16 bytes that stand for ``Generation.owner``."""
    return hashlib.blake2b(owner.encode(), digest_size=16).digest()


def unseal(slot: ByteArray) -> None:
    """Say that a slot holds nothing; before its first byte is overwritten."""
    slot[:PAGE_BYTES] = 0


def write_seal(slot: ByteArray, part: bytes, seal: Seal) -> None:
    """Put the part into a slot whose pack is complete, and seal it.

    Raises:
        PartTooLargeError: the part is larger than its room.
    """
    room_bytes = seal.pack_start - seal.part_start
    if len(part) > room_bytes:
        raise PartTooLargeError(
            f"a part of {len(part)} bytes does not fit into {room_bytes} bytes: the state of some "
            "object has grown; the next save makes room for it"
        )
    slot[seal.part_start : seal.part_start + len(part)] = np.frombuffer(part, np.uint8)
    record = encode_seal(seal)
    # the magic comes last: processes that look meanwhile see no seal
    slot[8 : len(record)] = np.frombuffer(record, np.uint8)[8:]
    slot[:8] = np.frombuffer(record, np.uint8)[:8]


def encode_seal(seal: Seal) -> bytes:
    """The bytes of a seal."""
    body = _SEAL.pack(
        _MAGIC,
        _VERSION,
        0,
        seal.step_id.generation,
        seal.step_id.step,
        seal.rank,
        seal.world_size,
        seal.part_start,
        seal.part_bytes,
        seal.pack_start,
        seal.pack_bytes,
        seal.part_crc32c,
        seal.owner,
    )
    return body + _CRC.pack(crc32c(body))


def read_seal(slot: ByteArray) -> Seal | None:
    """What a slot holds; None where its seal or part is not whole."""
    seal = decode_seal(slot[:PAGE_BYTES].tobytes(), len(slot))
    if seal is None or crc32c(part_of(slot, seal)) != seal.part_crc32c:
        return None
    return seal


def decode_seal(data: bytes, slot_bytes: int) -> Seal | None:
    """Inverse of ``encode_seal`` for a slot of a size; None for whatever is not a whole seal."""
    if len(data) < _SEAL.size + _CRC.size:
        return None
    body = data[: _SEAL.size]
    if _CRC.unpack_from(data, _SEAL.size)[0] != crc32c(body):
        return None
    magic, version, _, generation, step, rank, world, at, n, pack_at, pack_n, crc, owner = (
        _SEAL.unpack(body)
    )
    whole = PAGE_BYTES <= at <= at + n <= pack_at <= pack_at + pack_n <= slot_bytes
    if magic != _MAGIC or version != _VERSION or not whole or not rank < world:
        return None
    return Seal(
        step_id=StepId(generation, step),
        rank=rank,
        world_size=world,
        owner=owner,
        part_start=at,
        part_bytes=n,
        pack_start=pack_at,
        pack_bytes=pack_n,
        part_crc32c=crc,
    )


def part_of(slot: ByteArray, seal: Seal) -> bytes:
    """The bytes of the part of a sealed slot."""
    return slot[seal.part_start : seal.part_start + seal.part_bytes].tobytes()


def pack_of(slot: ByteArray, seal: Seal) -> ByteArray:
    """The bytes of the pack of a sealed slot, in place."""
    return slot[seal.pack_start : seal.pack_start + seal.pack_bytes]
