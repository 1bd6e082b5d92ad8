"""Reads boxes out of a pack in a local file or in memory, verifying it in the same pass."""

from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from everstep.checkpoint.errors import BlockChecksumError, PackHeaderError
from everstep.checkpoint.kernels import crc32c, scatter_box_crc
from everstep.checkpoint.pack import TABLE_SUFFIX, PackRecord, StridedBytes
from everstep.checkpoint.pack_files import MappedFile, PackFile, read_file
from everstep.checkpoint.pack_walk import (
    WINDOW_BYTES,
    PackCopy,
    Step,
    Window,
    plan_checks,
    plan_steps,
    plan_windows,
    split_copy,
)

_NO_COPY = PackCopy(0, 0, (1,), (0,), 1, StridedBytes(np.empty(0, np.uint8), 0, (1,)), 0)


class PackReader:
    """Reads boxes out of a pack, verifying every block that it touches; a context manager.

    Args:
        path: of the file, or words for where else the pack is.
        record: of the pack.
        threads: copy threads.
        file: the bytes of the pack, to be closed with this; None: those of the file at ``path``.

    Raises:
        PackTruncatedError: the file is missing or has another size than its record.
        PackHeaderError: header or checksum table are not what the record says.
        OSError: as the file system reports it.
    """

    def __init__(
        self,
        path: Path | str,
        record: PackRecord,
        *,
        threads: int = 1,
        file: PackFile | None = None,
    ) -> None:
        self._path, self._blocks, self._threads = path, record.blocks, threads
        self._file = file or MappedFile(Path(path), record.size_bytes)
        try:
            table = self._checked_table(record)
        except BaseException:
            self._file.close()
            raise
        self._expected = np.frombuffer(table, dtype="<u4")
        self._verified = bytearray(len(self._expected))

    def _checked_table(self, record: PackRecord) -> bytes:
        self._file.fetch(0, record.data_start)
        header, table_path = self._file.data[: record.data_start], self._path
        if record.extents is None:
            self._file.fetch(record.table_start, record.size_bytes)
            table = self._file.data[record.table_start :].tobytes()
        else:
            table_path = Path(f"{self._path}{TABLE_SUFFIX}")
            table = read_file(table_path, record.table_file_bytes)
        if crc32c(table, crc32c(header)) != record.crc32c:
            raise PackHeaderError(
                table_path, "its header or checksum table does not match the manifest"
            )
        if len(table) != 4 * self._blocks.n_blocks:
            raise PackHeaderError(self._path, "its checksum table has the wrong length")
        return table

    def read(
        self, copies: Iterable[PackCopy], on_bytes: Callable[[int], None] | None = None
    ) -> None:
        """Copy boxes out of the pack, which is read once, front to back.

        Args:
            copies: in any order.
            on_bytes: called with the bytes of each part that was copied.

        Raises:
            BlockChecksumError: a touched block is damaged; the arrays may be filled all the same.
            OSError: the file cannot be read; part of the arrays may be filled.
        """
        parts: list[PackCopy] = []
        for copy in copies:
            if copy.end - copy.begin <= WINDOW_BYTES:
                parts.append(copy)
            else:
                parts += split_copy(copy)
        parts.sort(key=lambda part: part.begin)
        steps = plan_steps(parts, self._blocks, self._verified)
        self._walk(plan_windows(steps, self._blocks), on_bytes)

    def verify_all(self) -> None:
        """Check every block; raises as ``read``."""
        self._walk(plan_windows(plan_checks(self._blocks, self._verified), self._blocks))

    def _walk(self, windows: list[Window], on_bytes: Callable[[int], None] | None = None) -> None:
        if not windows:
            return
        crcs = np.zeros(len(self._expected), np.uint32)
        seen = np.zeros(len(self._expected), np.bool_)
        ranges = [(window.begin, window.end) for window in windows]
        with closing(self._file.fetch_all(ranges)) as fetched:
            for window, _ in zip(windows, fetched, strict=True):
                for step in window.steps:
                    self._take(step, crcs, seen)
                    if on_bytes is not None and step.copy is not None:
                        on_bytes(step.copy.n_bytes)
        bad = np.flatnonzero((crcs != self._expected) & seen)
        if len(bad):
            at = int(bad[0])
            raise BlockChecksumError(self._path, at, int(self._expected[at]), int(crcs[at]))
        np.frombuffer(self._verified, np.bool_)[seen] = True

    def _take(self, step: Step, crcs: NDArray[np.uint32], seen: NDArray[np.bool_]) -> None:
        begin, end, copy = step
        size = self._blocks.block_bytes
        first = self._blocks.file_offset(begin) if begin < end else 0
        seen[begin // size : -(-end // size) if begin < end else 0] = True
        if copy is None:
            copy = _NO_COPY
        target = copy.target
        scatter_box_crc(
            target.buffer,
            target.offset_bytes + copy.target_bytes,
            target.strides_bytes,
            self._file.data,
            self._blocks.file_offset(copy.begin),
            copy.strides_bytes,
            copy.shape,
            copy.item_bytes,
            begin_bytes=first,
            end_bytes=first + end - begin,
            stream_offset_bytes=begin,
            block_bytes=size,
            block_crcs=crcs,
            threads=self._threads,
        )

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def __enter__(self) -> "PackReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
