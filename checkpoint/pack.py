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

import errno
import json
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np

from everstep.checkpoint.direct_io import ByteArray, StreamWriter
from everstep.checkpoint.errors import (
    BlockChecksumError,
    LayoutError,
    PackHeaderError,
)
from everstep.checkpoint.extents import Extent, Extents, Span
from everstep.checkpoint.kernels import copy_box, crc32c, crc32c_blocks, gather_box_crc
from everstep.checkpoint.layout import Fragment
from everstep.checkpoint.pack_files import map_file, read_file
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
FETCH_BLOCKS = 4
"""Blocks that are read and verified at a time: few enough to be in a cache when they are copied."""
_MADV_POPULATE_READ = 22


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


class PackReader:
    """Reads boxes out of a pack, verifying every block that it touches; a context manager.

    Raises:
        PackTruncatedError: the file is missing or has another size than its record.
        PackHeaderError: header or checksum table are not what the record says.
        OSError: as the file system reports it.
    """

    def __init__(self, path: Path, record: PackRecord, *, threads: int = 1) -> None:
        self._path, self._blocks, self._threads = path, record.blocks, threads
        self._map = map_file(path, record.size_bytes)
        self._bytes: ByteArray = np.frombuffer(self._map, dtype=np.uint8)
        self._fetch(0, record.data_start)
        header, table_path = self._bytes[: record.data_start], path
        if record.extents is None:
            self._fetch(record.table_start, record.size_bytes)
            table = self._bytes[record.table_start :].tobytes()
        else:
            table_path = path.with_name(path.name + TABLE_SUFFIX)
            table = read_file(table_path, record.table_file_bytes)
        if crc32c(table, crc32c(header)) != record.crc32c:
            raise PackHeaderError(
                table_path, "its header or checksum table does not match the manifest"
            )
        if len(table) != 4 * self._blocks.n_blocks:
            raise PackHeaderError(path, "its checksum table has the wrong length")
        self._expected = np.frombuffer(table, dtype="<u4")
        self._verified = bytearray(len(self._expected))

    def read_box(
        self,
        begin: int,
        end: int,
        strides_bytes: tuple[int, ...],
        shape: tuple[int, ...],
        item_bytes: int,
        target: StridedBytes,
        target_bytes: int = 0,
    ) -> None:
        """Copy a box out of the data into an array; see ``copy_plan.BoxCopy``.

        Args:
            begin: address of the first item of the box (see ``extents``): its byte offset in the
                data.
            end: address where its last item ends.
            strides_bytes: of the box in the data; none is negative.
            shape: items per dim; there is no 0.
            item_bytes: bytes per item.
            target: the array to fill; writable.
            target_bytes: how far from its first item the first item of the box goes.

        Raises:
            BlockChecksumError: a touched block is damaged; nothing was copied.
        """
        self._verify(begin, end)
        copy_box(
            target.buffer,
            target.offset_bytes + target_bytes,
            target.strides_bytes,
            self._bytes,
            self._blocks.file_offset(begin),
            strides_bytes,
            shape,
            item_bytes,
            threads=self._threads,
        )

    def verify_all(self) -> None:
        """Check every block."""
        self._verify(0, self._blocks.end)

    def _verify(self, begin: int, end: int) -> None:
        first, stop = begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)
        while (first := self._verified.find(0, first, stop)) >= 0:
            run = self._verified.find(1, first, min(stop, first + FETCH_BLOCKS))
            run = min(stop, first + FETCH_BLOCKS) if run < 0 else run
            for span in self._blocks.spans(first, run):
                self._verify_span(span)
            self._verified[first:run] = b"\1" * (run - first)

    def _verify_span(self, span: Span) -> None:
        self._fetch(span.offset, span.offset + span.n_bytes)
        data = self._bytes[span.offset : span.offset + span.n_bytes]
        found = crc32c_blocks(data, BLOCK_BYTES, threads=self._threads)
        expected = self._expected[span.block : span.block + len(found)]
        bad = np.flatnonzero(found != expected)
        if len(bad):
            at = int(bad[0])
            raise BlockChecksumError(self._path, span.block + at, int(expected[at]), int(found[at]))

    def _fetch(self, begin: int, end: int) -> None:
        """Read a range of the file at once, so that an I/O error is an exception, not a SIGBUS."""
        begin -= begin % mmap.PAGESIZE
        try:
            if begin < end:
                self._map.madvise(_MADV_POPULATE_READ, begin, end - begin)
        except OSError as e:
            if e.errno != errno.EINVAL:  # EINVAL: Linux before 5.14, which reads as it goes
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(self._path)) from e

    def close(self) -> None:
        """Let go of the file."""
        del self._bytes, self._map

    def __enter__(self) -> "PackReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def dense_strides(shape: Sequence[int], item_bytes: int) -> tuple[int, ...]:
    """Strides in bytes of an array of a shape in C order without gaps."""
    strides, step = [], item_bytes
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))
