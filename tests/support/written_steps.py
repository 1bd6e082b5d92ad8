"""Committed checkpoints of arrays cut along any grid, without a model and without torch."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.kernels import crc32c, crc32c_blocks
from everstep.checkpoint.layout import (
    ITEM_BYTES,
    Box,
    Fragment,
    Grid,
    TensorSpec,
)
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.manifest import Manifest, Part, build_manifest
from everstep.checkpoint.pack import (
    BLOCK_BYTES,
    PackRecord,
    StridedBytes,
    dense_strides,
    plan_pack,
    write_pack,
)
from tests.support.fragments import flat_fragment
from tests.support.raw_extents import raw_pack

BITS = {16: "V16", 8: "<u8", 4: "<u4", 2: "<u2", 1: "u1"}
"""Arrays hold the bits of items, by bytes per item."""


@dataclass(frozen=True)
class Cut:
    """A tensor to be saved, by its bits: whole, or cut in one of three ways."""

    dtype: str
    bits: np.ndarray[Any, Any]
    inner: Sequence[Sequence[int]] | None = None
    """Inner boundaries per dim, of a grid."""
    flat: Sequence[int] | None = None
    """Inner boundaries of ranges of the flattened tensor."""
    boxes: Sequence[Box] | None = None

    @property
    def grid(self) -> Grid:
        """The cells; without boundaries one."""
        inner = self.inner or [()] * self.bits.ndim
        return Grid(
            tuple(
                (0, *cuts, n) if n else (0,) for cuts, n in zip(inner, self.bits.shape, strict=True)
            )
        )

    def fragments(self, name: str) -> list[Fragment]:
        """What packs are to hold of it; an empty tensor is written once."""
        spec = TensorSpec(name, self.dtype, self.bits.shape)
        if self.flat is not None and self.bits.size:
            edges = [0, *self.flat, self.bits.size]
            return [flat_fragment(spec, lo, hi) for lo, hi in pairwise(edges)]
        cells = self.grid.cells() if self.boxes is None or not self.bits.size else self.boxes
        return [Fragment(spec, cell) for cell in cells] or [Fragment(spec, spec.whole)]


def random_bits(shape: Sequence[int], dtype: str, seed: int = 0) -> np.ndarray[Any, Any]:
    """An array of any bits that the type can have."""
    spec = TensorSpec("", dtype, tuple(shape))
    bits = np.random.default_rng(seed).integers(0, 256, spec.size_bytes, np.uint8)
    return (bits % 2 if dtype == "BOOL" else bits).view(BITS[spec.item_bytes]).reshape(shape)


def torch_chunks(n: int, *parts: int) -> list[int]:
    """Inner boundaries of a dim cut as ``torch.chunk`` does, along one axis after another."""
    spans = [(0, n)]
    for count in parts:
        spans = [
            (at, min(hi, at + max(1, -(-(hi - lo) // count))))
            for lo, hi in spans
            for at in range(lo, hi, max(1, -(-(hi - lo) // count)))
        ]
    return [lo for lo, _ in spans[1:]]


def write_step(
    root: Path,
    cuts: Mapping[str, Cut],
    *,
    step: int = 1,
    seed: int = 0,
    raw: Collection[int] = (),
) -> tuple[Path, Manifest]:
    """Save tensors as one committed step, with a pack for each cell of the most-cut one.

    Which pack holds a cell is random; the packs with the numbers ``raw`` are of raw extents.
    Returns the directory of the step, and its manifest.
    """
    held = share_out(cuts, seed)
    directory = CheckpointDirectory(root)
    directory.create_generation(None, {"dp": len(held)})
    step_id = StepId(1, step)
    path = directory.begin_step(step_id)

    for rank, fragments in enumerate(held):
        plan = plan_pack(rank, fragments)
        if rank in raw:
            record, files = raw_pack(rank, fragments, lambda f: _cell(cuts, f).tobytes(), seed)
            for name, data in files.items():
                (path / name).write_bytes(data)
            directory.put_part(part_of_rank(rank, len(held), step, record, plan.fragments))
            continue
        record = write_pack(path / f"rank-{rank:05d}-ab.safetensors", plan, source_in(cuts))
        directory.put_part(part_of_rank(rank, len(held), step, record, plan.fragments))
    directory.commit(step_id, len(held))
    return path, directory.manifest(step_id)


def uneven_cuts() -> dict[str, Cut]:
    """Tensors as ranks leave them behind, of every kind that a view treats in its own way."""
    cuts = {
        f"types.{dtype}": Cut(dtype, random_bits((5, 3), dtype, 1), ([2], []))
        for dtype in ITEM_BYTES
    }
    bits = random_bits((7, 5), "I16", 2)
    cuts["flat"] = Cut("I16", bits, flat=(12, 24))
    cuts["flat rows"] = Cut("I16", bits, flat=(10, 20, 30))
    cuts["flat scalar"] = Cut("I16", bits[0, 0], flat=())
    cuts["boxes"] = Cut(
        "I16",
        bits,
        boxes=[Box((0, 0), (4, 2)), Box((0, 2), (2, 3)), Box((2, 2), (2, 3)), Box((4, 0), (3, 5))],
    )
    shapes = {
        "rows": ((13, 4), ((4,), ())),  # the last chunk is short
        "rows of rows": ((1001, 4), ((2, 4), ())),  # tensor parallel, then data parallel
        "columns": ((300, 7), ((2,), (3,))),  # rows are no runs of bytes: several arrays
        "both": ((8, 6), ((2,), (3,))),
        "fine": ((10, 3), ((2, 2), ())),  # 3, 2, 3, 2
        "cube": ((4, 6, 5), ((2,), (3,), (2,))),
        "scalar": ((), ()),
        "empty": ((0, 3), ((), ())),
        "optimizer.a/b%.__x": ((3,), ((2,),)),
        "__x": ((3,), ((2,),)),
    }
    for seed, (name, (shape, parts)) in enumerate(shapes.items(), start=3):
        inner = [torch_chunks(n, *p) for n, p in zip(shape, parts, strict=True)]
        cuts[name] = Cut("BF16", random_bits(shape, "BF16", seed), inner)
    return cuts


def packed(
    cuts: Mapping[str, Cut], seed: int = 0, raw: Collection[int] = ()
) -> tuple[Manifest, dict[str, bytes]]:
    """The same as ``write_step`` without any file: the manifest, and the bytes of each pack."""
    parts: list[Part] = []
    packs: dict[str, bytes] = {}
    held = share_out(cuts, seed)
    for rank, fragments in enumerate(held):
        plan = plan_pack(rank, fragments)
        if rank in raw:
            record, files = raw_pack(rank, fragments, lambda f: _cell(cuts, f).tobytes(), seed)
            packs |= files
            parts.append(part_of_rank(rank, len(held), 1, record, plan.fragments))
            continue
        data = b"".join(_cell(cuts, f).tobytes() for f in plan.fragments)
        name = f"rank-{rank:05d}-ab.safetensors"
        table = crc32c_blocks(data, BLOCK_BYTES).astype("<u4").tobytes()
        packs[name] = plan.header + data + table
        record = PackRecord(
            file=name,
            rank=rank,
            size_bytes=plan.size_bytes,
            data_start=len(plan.header),
            data_bytes=plan.data_bytes,
            crc32c=crc32c(table, crc32c(plan.header)),
        )
        parts.append(part_of_rank(rank, len(held), 1, record, plan.fragments))
    return build_manifest(parts), packs


def share_out(cuts: Mapping[str, Cut], seed: int) -> list[list[Fragment]]:
    """For each pack the fragments that it is to hold."""
    rng = np.random.default_rng(seed)
    fragments = [cut.fragments(name) for name, cut in cuts.items()]
    held: list[list[Fragment]] = [[] for _ in range(max([1, *map(len, fragments)]))]
    for of_one in fragments:
        for pack, fragment in zip(rng.permutation(len(held)), of_one, strict=False):
            held[pack].append(fragment)
    return held


def source_in(cuts: Mapping[str, Cut]) -> Callable[[Fragment], StridedBytes]:
    """Where writers of packs find the bytes of a fragment."""

    def source_of(fragment: Fragment) -> StridedBytes:
        cell = _cell(cuts, fragment)
        strides = dense_strides(cell.shape, cell.itemsize)
        return StridedBytes(cell.reshape(-1).view(np.uint8), 0, strides)

    return source_of


def _cell(cuts: Mapping[str, Cut], fragment: Fragment) -> np.ndarray[Any, Any]:
    box, bits = fragment.box, cuts[fragment.spec.name].bits
    index = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
    return np.array((bits.reshape(-1) if fragment.flat else bits)[index], order="C")


def part_of_rank(
    rank: int, world_size: int, step: int, record: PackRecord, fragments: tuple[Fragment, ...]
) -> Part:
    """The vote of a rank; rank 0 also tells the mesh."""
    context = {"mesh": {"dp": world_size}, "producer": {}, "objects": {}}
    return Part(
        generation=1,
        step=step,
        rank=rank,
        world_size=world_size,
        pack=record,
        fragments=fragments,
        context=context if rank == 0 else {},
    )
