"""A pack: the fragments of one rank as one valid safetensors file, or as extents of any file.

Layout of a safetensors file, all integers little-endian::

    u64 header length | JSON header, padded with spaces | data | everstep.block_crc32c

The data starts at a multiple of 4096. Fragments follow each other without holes, ordered by item
size (largest first), then name, then box, so that each is aligned to its own item size. The last
tensor holds one CRC-32C per ``BLOCK_BYTES`` of data, as little-endian u32: the data comes first, so
checksums computed while streaming can still be written. The header depends on the layout only.

A pack of raw extents is a file without a header, in which each fragment lies by itself, at a byte
offset that the manifest gives; whatever is between them is none of the pack's business. The
checksums, one per block of each fragment, are in a file of their own beside it.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from everstep.checkpoint.direct_io import ByteArray, StreamWriter
from everstep.checkpoint.errors import LayoutError
from everstep.checkpoint.extents import Extent, Extents
from everstep.checkpoint.kernels import crc32c, gather_box_crc
from everstep.checkpoint.layout import Fragment
from everstep.checkpoint.store import StoreWriter

PACK_VERSION = "1"
BLOCK_BYTES = 2**20
DATA_ALIGN_BYTES = 4096
TABLE_NAME = "everstep.block_crc32c"
TABLE_SUFFIX = ".crc32c"
"""The checksums of a file of raw extents are in the file of its name with this suffix."""
STORED_AS: dict[str, tuple[str, tuple[int, ...]]] = {
    "C128": ("F64", (2,)),
    "C32": ("F16", (2,)),
    "F4_X2": ("U8", ()),
}
"""What safetensors has no dtype for -> the dtype that its entry has, and dims after its own."""


@dataclass(frozen=True)
class StridedBytes:
    """The bytes of an n-d array: item [i, j, ...] lies at ``offset + i*strides[0] + ...``."""

    buffer: ByteArray
    offset_bytes: int
    strides_bytes: tuple[int, ...]


@dataclass(frozen=True)
class PackPlan:
    """Where everything goes in a pack; a function of rank and fragments only."""

    rank: int
    fragments: tuple[Fragment, ...]
    starts: tuple[int, ...]
    """Byte offset of each fragment in the data."""
    data_bytes: int
    header: bytes
    """With its length and padding; the data starts right after it."""

    @property
    def n_blocks(self) -> int:
        """Number of checksummed blocks."""
        return -(-self.data_bytes // BLOCK_BYTES)

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + self.data_bytes + 4 * self.n_blocks


@dataclass(frozen=True, kw_only=True)
class PackRecord:
    """What parts and manifests say of a pack."""

    file: str
    rank: int
    size_bytes: int
    data_start: int
    """Byte offset of the data in the file; 0 for raw extents."""
    data_bytes: int
    crc32c: int
    """Of header and checksum table together; through the table it vouches for every byte."""
    extents: tuple[Extent, ...] | None = None
    """Of raw extents, where each fragment is that is not empty, in the order of a pack."""

    @property
    def kind(self) -> str:
        """What the file is."""
        return "safetensors" if self.extents is None else "raw_extents"

    @property
    def table_file(self) -> str:
        """The file with the checksum table."""
        return self.file if self.extents is None else self.file + TABLE_SUFFIX

    @property
    def table_start(self) -> int:
        """Byte offset of the checksum table in its file; it ends where the file ends."""
        return self.data_start + self.data_bytes if self.extents is None else 0

    @property
    def table_file_bytes(self) -> int:
        """Size of the file with the checksum table."""
        return self.size_bytes if self.extents is None else 4 * self.blocks.n_blocks

    @cached_property
    def blocks(self) -> Extents:
        """Where its blocks lie in the file."""
        dense = ((self.data_start, self.data_bytes),) if self.data_bytes else ()
        return Extents(dense if self.extents is None else self.extents, BLOCK_BYTES)


def pack_order(fragments: Iterable[Fragment]) -> list[Fragment]:
    """The order of fragments in a pack."""
    return sorted(fragments, key=lambda f: (-f.spec.item_bytes, f.spec.name, f.box.offset))


def pack_starts(ordered: Sequence[Fragment]) -> tuple[tuple[int, ...], int]:
    """Byte offset of each fragment in the data, and the size of the data."""
    starts, position = [], 0
    for fragment in ordered:
        starts.append(position)
        position += fragment.size_bytes
    return tuple(starts), position


def plan_pack(rank: int, fragments: Iterable[Fragment]) -> PackPlan:
    """Plan a pack; the result can be cached for as long as the layout stays.

    Raises:
        LayoutError: two fragments would have the same name in the file.
    """
    ordered = tuple(pack_order(fragments))
    starts, data_bytes = pack_starts(ordered)
    entries: dict[str, object] = {
        "__metadata__": {
            "everstep_pack": PACK_VERSION,
            "rank": str(rank),
            "fragments": json.dumps(
                {f.key: _described(f) for f in ordered},
                separators=(",", ":"),
            ),
        }
    }
    for fragment, start in zip(ordered, starts, strict=True):
        dtype, more_dims = STORED_AS.get(fragment.spec.dtype, (fragment.spec.dtype, ()))
        entries[fragment.key] = {
            "dtype": dtype,
            "shape": (*fragment.box.shape, *more_dims),
            "data_offsets": [start, start + fragment.size_bytes],
        }
    if len(entries) != 1 + len(ordered):
        raise LayoutError(f"two fragments of the pack of rank {rank} have the same name")
    table_bytes = 4 * -(-data_bytes // BLOCK_BYTES)
    entries[TABLE_NAME] = {
        "dtype": "U8",
        "shape": [table_bytes],
        "data_offsets": [data_bytes, data_bytes + table_bytes],
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    padded = -(-(8 + len(text)) // DATA_ALIGN_BYTES) * DATA_ALIGN_BYTES - 8
    header = padded.to_bytes(8, "little") + text.ljust(padded)
    return PackPlan(rank, ordered, starts, data_bytes, header)


def _described(fragment: Fragment) -> list[object]:
    """Name, global shape and place of a fragment; its dtype where the entry has another."""
    spec, box = fragment.spec, fragment.box
    place = {"flat": box.offset[0]} if fragment.flat else box.offset
    return [spec.name, spec.shape, place, *([spec.dtype] if spec.dtype in STORED_AS else [])]


def write_pack(
    path: Path,
    plan: PackPlan,
    source_of: Callable[[Fragment], StridedBytes],
    *,
    threads: int = 1,
    on_bytes: Callable[[int], None] | None = None,
) -> PackRecord:
    """Write a new pack as a local file and make it durable; on any error the file is gone again.

    Arguments and errors are those of ``stream_pack``.
    """
    with StreamWriter(path) as out:
        return stream_pack(out, path.name, plan, source_of, threads=threads, on_bytes=on_bytes)


def stream_pack(
    out: StoreWriter,
    file: str,
    plan: PackPlan,
    source_of: Callable[[Fragment], StridedBytes],
    *,
    threads: int = 1,
    on_bytes: Callable[[int], None] | None = None,
) -> PackRecord:
    """Write a pack and make it durable.

    Args:
        out: takes the bytes; leaving its context after an error is up to the caller.
        file: name of the pack, for its record.
        plan: its plan.
        source_of: where the bytes of a fragment are; asked once for each that has any, in order,
            so that one from a device can be fetched then and dropped before the next.
        threads: copy threads.
        on_bytes: called with the number of data bytes taken over so far.

    Raises:
        FileExistsError: there is such a pack already.
        OSError: as the store reports it.
    """
    crcs = np.zeros(plan.n_blocks, dtype=np.uint32)
    out.append(plan.header)
    for fragment, start in zip(plan.fragments, plan.starts, strict=True):
        done = 0
        source = source_of(fragment) if fragment.size_bytes else None
        while source is not None and done < fragment.size_bytes:
            space = out.space()
            n = min(len(space), fragment.size_bytes - done)
            gather_box_crc(
                space,
                0,
                source.buffer,
                source.offset_bytes,
                source.strides_bytes,
                fragment.box.shape,
                fragment.spec.item_bytes,
                begin_bytes=done,
                end_bytes=done + n,
                stream_offset_bytes=start + done,
                block_bytes=BLOCK_BYTES,
                block_crcs=crcs,
                threads=threads,
            )
            out.advance(n)
            done += n
            if on_bytes is not None:
                on_bytes(start + done)
    table = crcs.astype("<u4").tobytes()
    out.append(table)
    return PackRecord(
        file=file,
        rank=plan.rank,
        size_bytes=out.finish(),
        data_start=len(plan.header),
        data_bytes=plan.data_bytes,
        crc32c=crc32c(table, crc32c(plan.header)),
    )


def dense_strides(shape: Sequence[int], item_bytes: int) -> tuple[int, ...]:
    """Strides in bytes of an array of a shape in C order without gaps."""
    strides, step = [], item_bytes
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))
