"""Writes packs of raw extents, such as an optimizer leaves behind that keeps its state in files."""

from collections.abc import Callable, Iterable

import numpy as np

from everstep.checkpoint.kernels import crc32c, crc32c_blocks
from everstep.checkpoint.layout import Fragment
from everstep.checkpoint.pack import BLOCK_BYTES, PackRecord, pack_order


def raw_pack(
    rank: int,
    fragments: Iterable[Fragment],
    bytes_of: Callable[[Fragment], bytes],
    seed: int = 0,
) -> tuple[PackRecord, dict[str, bytes]]:
    """A pack whose fragments lie in random order, with random bytes in random gaps between them.

    Returns its record, and the bytes of its two files by name.
    """
    rng = np.random.default_rng(seed + rank)
    held = [f for f in pack_order(fragments) if f.size_bytes]
    position, offsets = int(rng.integers(0, 3)), [0] * len(held)
    for number in rng.permutation(len(held)).tolist():
        item_bytes = held[number].spec.item_bytes
        position += item_bytes * int(rng.integers(0, 4))
        offsets[number] = position = -(-position // item_bytes) * item_bytes
        position += held[number].size_bytes
    file = bytearray(rng.bytes(position + int(rng.integers(1, 9))))
    table = b""
    for fragment, offset in zip(held, offsets, strict=True):
        data = bytes_of(fragment)
        file[offset : offset + len(data)] = data
        table += crc32c_blocks(data, BLOCK_BYTES).astype("<u4").tobytes()
    name = f"rank-{rank:05d}-ab.extents"
    record = PackRecord(
        file=name,
        rank=rank,
        size_bytes=len(file),
        data_start=0,
        data_bytes=sum(f.size_bytes for f in held),
        crc32c=crc32c(table),
        extents=tuple((o, f.size_bytes) for o, f in zip(offsets, held, strict=True)),
    )
    return record, {name: bytes(file), f"{name}.crc32c": table}
