"""Plans for large jobs: 30,000 tensors over 64 ranks, from bytes."""

import time

import pytest

from everstep.checkpoint.layout import Box, Fragment, Grid, TensorSpec
from everstep.checkpoint.manifest import (
    Manifest,
    StoredTensor,
    decode_manifest,
    encode_manifest,
)
from everstep.checkpoint.pack import BLOCK_BYTES, PackRecord
from everstep.checkpoint.places import place
from everstep.checkpoint.reshard import plan_load, plan_save

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

RANKS = 64
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (4096,), (32000, 4096)]


def _tensors() -> list[StoredTensor]:
    """Parameters and moments, cut into 64 pieces along their first dim."""
    found = []
    for number in range(10_000):
        shape = SHAPES[number % len(SHAPES)]
        width = -(-shape[0] // RANKS)
        bounds = (*range(0, shape[0], width), shape[0])
        grid = Grid((bounds, *((0, n) for n in shape[1:])))
        for kind, dtype in (("model", "BF16"), ("exp_avg", "F32"), ("exp_avg_sq", "F32")):
            spec = TensorSpec(f"{kind}.layers.{number // 7}.part{number % 7}.weight", dtype, shape)
            found.append(StoredTensor(spec, grid, tuple(range(grid.n_cells))))
    return sorted(found, key=lambda t: t.spec)


def _manifest() -> Manifest:
    tensors = _tensors()
    sizes = place(((t.spec, t.layout, t.packs) for t in tensors), RANKS).held_bytes
    packs = [
        PackRecord(
            file=f"p{rank}",
            rank=rank,
            size_bytes=4096 + size + 4 * -(-size // BLOCK_BYTES),
            data_start=4096,
            data_bytes=size,
            crc32c=0,
        )
        for rank, size in enumerate(sizes)
    ]
    return Manifest(
        generation=1,
        step=1,
        mesh={"dp": RANKS},
        producer={},
        objects={},
        packs=tuple(packs),
        tensors={t.spec.name: t for t in tensors},
    )


def _plan_rank(data: bytes, ranks: int, rank: int) -> int:
    """Decode, and plan what one of another number of ranks reads; the number of copies."""
    manifest, copies = decode_manifest(data, "m"), 0
    for name, stored in manifest.tensors.items():
        n, *rest = stored.spec.shape
        width = -(-n // ranks)
        begin, end = min(n, rank * width), min(n, (rank + 1) * width)
        wanted = Box((begin, *(0 for _ in rest)), (end - begin, *rest))
        starts, item_bytes = manifest.starts(name), stored.spec.item_bytes
        copies += len(plan_load(stored.layout, stored.packs, starts, item_bytes, wanted))
    return copies


def test_one_rank_plans_its_load_of_a_large_job_in_about_a_second() -> None:
    """The target is 1 s on an idle machine; a busy one may take twice as much."""
    data = encode_manifest(_manifest())
    begun_s = time.process_time()
    assert _plan_rank(data, 48, 3) >= 30_000
    assert time.process_time() - begun_s < 2


def test_a_save_of_a_large_job_is_planned_in_a_few_seconds() -> None:
    held: list[list[Fragment]] = [[] for _ in range(RANKS)]
    for stored in _tensors():
        for rank, cell in enumerate(stored.layout.cells()):
            held[rank].append(Fragment(stored.spec, cell))
    replicas = [[Fragment(t.spec, t.spec.whole) for t in _tensors()]] * RANKS
    begun_s = time.process_time()
    assert plan_save(held) == [sorted(mine, key=lambda f: f.spec.name) for mine in held]
    owned = plan_save(replicas, [rank // 8 for rank in range(RANKS)])
    load = [sum(f.size_bytes for f in mine) for mine in owned]
    assert max(load) < 1.01 * min(load)
    assert time.process_time() - begun_s < 20
