"""How long one rank plans a load of a large checkpoint, from the bytes of its manifest on."""

import time
from collections.abc import Callable
from typing import TypeVar

from everstep.checkpoint.collector import collector_paused
from everstep.checkpoint.copy_plan import BoxCopy, plan_copies
from everstep.checkpoint.layout import Box, Grid, TensorSpec
from everstep.checkpoint.manifest import (
    Manifest,
    StoredTensor,
    decode_manifest,
    encode_manifest,
)
from everstep.checkpoint.pack import (
    BLOCK_BYTES,
    DATA_ALIGN_BYTES,
    PackRecord,
    dense_strides,
)

SAVED_RANKS = 64
ROWS, COLUMNS = 4096, 1024
WANTED_ROWS, WANTED_COLUMNS = 16, 2
"""The mesh that loads cuts tensors into boxes, so that each rank needs bytes of several packs."""
T = TypeVar("T")


def manifest_bytes(tensors: int) -> bytes:
    """A manifest of as many tensors, each in row shards on 64 ranks."""
    rows = ROWS // SAVED_RANKS
    bounds = (tuple(range(0, ROWS + 1, rows)), (0, COLUMNS))
    stored = {
        name: StoredTensor(
            TensorSpec(name, "BF16", (ROWS, COLUMNS)), Grid(bounds), tuple(range(SAVED_RANKS))
        )
        for name in (f"model.layers.{i // 9}.part{i % 9}.weight" for i in range(tensors))
    }
    data_bytes = 2 * rows * COLUMNS * tensors
    table_bytes = 4 * -(-data_bytes // BLOCK_BYTES)
    packs = tuple(
        PackRecord(
            file=f"rank-{rank:05d}-0a1b2c3d.safetensors",
            rank=rank,
            size_bytes=DATA_ALIGN_BYTES + data_bytes + table_bytes,
            data_start=DATA_ALIGN_BYTES,
            data_bytes=data_bytes,
            crc32c=rank,
        )
        for rank in range(SAVED_RANKS)
    )
    return encode_manifest(
        Manifest(
            generation=1,
            step=1,
            mesh={"dp": SAVED_RANKS},
            producer={},
            objects={},
            packs=packs,
            tensors=stored,
        )
    )


def time_plan(tensors: int) -> dict[str, float]:
    """CPU seconds of each stage of planning what rank 5 of a 16x2 mesh reads of every tensor."""
    data = manifest_bytes(tensors)
    manifest, decode_s = _timed(lambda: decode_manifest(data, "manifest.json"))
    shape = (ROWS // WANTED_ROWS, COLUMNS // WANTED_COLUMNS)
    wanted = Box((2 * shape[0], 1 * shape[1]), shape)
    strides = dense_strides(shape, 2)

    @collector_paused()  # as a load does
    def plan() -> list[list[BoxCopy]]:
        return [
            plan_copies(
                stored.layout,
                stored.packs,
                manifest.starts(name),
                stored.spec.item_bytes,
                wanted,
                strides,
            )
            for name, stored in manifest.tensors.items()
        ]

    copies, plan_s = _timed(plan)
    found = sum(map(len, copies))
    if found != tensors * SAVED_RANKS // WANTED_ROWS:
        raise AssertionError(f"{found} copies for {tensors} tensors")
    return {
        "manifest_bytes": len(data),
        "decode_s": decode_s,
        "plan_s": plan_s,
        "total_s": decode_s + plan_s,
    }


def _timed(action: Callable[[], T]) -> tuple[T, float]:
    began_s = time.process_time()
    result = action()
    return result, time.process_time() - began_s
