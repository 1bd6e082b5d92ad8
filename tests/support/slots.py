"""Sealed slots without a model and without torch: every rank holds a piece of one tensor."""

import mmap
from typing import Any

import numpy as np

from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.kernels import crc32c
from everstep.checkpoint.layout import Box, Fragment, TensorSpec
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.manifest import Part, encode_part
from everstep.checkpoint.pack import StridedBytes, plan_pack, stream_pack
from everstep.checkpoint.snapshots.slot_format import (
    Seal,
    owner_digest,
    slot_layout,
    write_seal,
)
from everstep.checkpoint.step_reader import StepReader
from everstep.checkpoint.store_memory import MemoryStore

NAME = "model.w"


def values_of(step_id: StepId, rank: int, n_bytes: int) -> ByteArray:
    """What a rank has of the tensor at a step."""
    seed = [step_id.generation, step_id.step, rank]
    return np.random.default_rng(seed).integers(0, 256, n_bytes, np.uint8)


def aligned(n_bytes: int) -> ByteArray:
    """Memory that begins at a page, as slots do."""
    return np.frombuffer(mmap.mmap(-1, n_bytes), np.uint8)


def sealed_slot(
    step_id: StepId,
    rank: int = 0,
    world_size: int = 1,
    *,
    n_bytes: int = 10_001,
    owner: str = "",
    attempt: str = "aa",
    slot: ByteArray | None = None,
) -> ByteArray:
    """A slot that holds a snapshot of ``n_bytes`` per rank.

    Args:
        step_id: of the snapshot.
        rank: whose slot it is.
        world_size: number of ranks.
        n_bytes: of each rank's piece.
        owner: of the generation.
        attempt: what the pack's name says.
        slot: where; None: in new memory.
    """
    spec = TensorSpec(NAME, "U8", (world_size * n_bytes,))
    fragment = Fragment(spec, Box((rank * n_bytes,), (n_bytes,)))
    store, name = MemoryStore(), f"rank-{rank:05d}-{attempt}.safetensors"
    plan = plan_pack(rank, [fragment])
    values = values_of(step_id, rank, n_bytes)
    with store.writer(name, plan.size_bytes) as out:
        record = stream_pack(out, name, plan, lambda _: StridedBytes(values, 0, (1,)))
    pack = np.frombuffer(store.read(name), np.uint8)
    context: dict[str, Any] = {"mesh": {"dp": world_size}, "producer": {}, "objects": {}}
    part = encode_part(
        Part(
            generation=step_id.generation,
            step=step_id.step,
            rank=rank,
            world_size=world_size,
            pack=record,
            fragments=(fragment,),
            context=context if rank == 0 else {},
        )
    )
    layout = slot_layout(len(pack), len(part))
    if slot is None:
        slot = aligned(layout.slot_bytes)
    slot[layout.pack_start : layout.pack_start + len(pack)] = pack
    seal = Seal(
        step_id=step_id,
        rank=rank,
        world_size=world_size,
        owner=owner_digest(owner),
        part_start=layout.part_start,
        part_bytes=len(part),
        pack_start=layout.pack_start,
        pack_bytes=len(pack),
        part_crc32c=crc32c(part),
    )
    write_seal(slot, part, seal)
    return slot


def holds(reader: StepReader, step_id: StepId, world_size: int = 1, n_bytes: int = 10_001) -> bool:
    """Whether a committed step has the tensor of all ranks."""
    wanted = np.concatenate([values_of(step_id, rank, n_bytes) for rank in range(world_size)])
    return bool(np.array_equal(reader.read(NAME), wanted))
