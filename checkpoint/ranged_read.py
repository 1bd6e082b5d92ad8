"""Reads boxes of tensors from an object store: parallel ranged requests, verified block by block.

The memory of keepers on other nodes is read in the same way.

Beside the arrays that are filled, memory is needed for the windows under way only:
``(AT_ONCE + 2) * WINDOW_BLOCKS`` blocks, 32 MiB.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from everstep.checkpoint.collector import collector_paused
from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.errors import BlockChecksumError, PackHeaderError, PackTruncatedError
from everstep.checkpoint.kernels import copy_box, crc32c, crc32c_blocks
from everstep.checkpoint.layout import Box
from everstep.checkpoint.manifest import Manifest
from everstep.checkpoint.pack import BLOCK_BYTES, StridedBytes, dense_strides
from everstep.checkpoint.ranged_plan import (
    WINDOW_BLOCKS,
    Blocks,
    Piece,
    Window,
    needed_blocks,
    pieces_of,
    plan_windows,
)
from everstep.checkpoint.reshard import plan_load
from everstep.checkpoint.store import PackFolder

AT_ONCE = 6
"""Requests under way."""

Arrivals = Generator[tuple[Window, ByteArray], None, None]
"""Windows with their bytes, in the order of the windows."""


@dataclass(frozen=True)
class Request:
    """A box of a tensor, and the array of its shape to fill with it."""

    name: str
    box: Box
    target: StridedBytes


class RangedReader:
    """Fills arrays with boxes of the tensors of one committed checkpoint."""

    def __init__(self, folder: PackFolder, manifest: Manifest, *, threads: int = 1) -> None:
        self.folder, self.manifest, self._threads = folder, manifest, threads
        self.tables: dict[int, NDArray[np.uint32]] = {}
        """For each pack that was opened, the checksums of its blocks."""

    @collector_paused()
    def plan(self, requests: Sequence[Request]) -> dict[int, list[Piece]]:
        """For each pack that is needed, the pieces to copy out of it, ascending by their end."""
        found: dict[int, list[Piece]] = {}
        for number, request in enumerate(requests):
            stored = self.manifest.tensors[request.name]
            starts, item_bytes = self.manifest.starts(request.name), stored.spec.item_bytes
            for copy in plan_load(stored.layout, stored.packs, starts, item_bytes, request.box):
                found.setdefault(copy.pack, []).extend(
                    pieces_of(number, copy.start, copy.cell, copy.box, item_bytes, BLOCK_BYTES)
                )
        for pieces in found.values():
            pieces.sort(key=lambda p: (p.end, p.begin))
        return dict(sorted(found.items()))

    def needs(self, plan: dict[int, list[Piece]]) -> dict[int, Blocks]:
        """The blocks that a plan touches, by pack."""
        ends = {pack: self.manifest.packs[pack].blocks.end for pack in plan}
        return {pack: needed_blocks(plan[pack], ends[pack], BLOCK_BYTES) for pack in plan}

    def fill(
        self, requests: Sequence[Request], on_bytes: Callable[[int], None] | None = None
    ) -> None:
        """Fill all arrays, reading every block that is needed once.

        Raises:
            DamagedError: a pack is not what the manifest says; part of the arrays may be filled.
            OSError: as the store reports it.
        """
        plan = self.plan(requests)
        needs = self.needs(plan)
        self.open_packs(plan)
        windows = [w for pack, blocks in needs.items() for w in plan_windows(pack, blocks)]
        with closing(self.fetch_all(windows)) as arrivals:
            self.copy(requests, plan, needs, arrivals, on_bytes)

    def verify(self, pack: int) -> None:
        """Check every byte of a pack, by its number in the manifest; raises DamagedError."""
        self.open_packs([pack])
        needed = np.ones(len(self.tables[pack]), np.bool_)
        with closing(self.fetch_all(plan_windows(pack, needed))) as arrivals:
            for window, data in arrivals:
                self._check(window, data, needed)

    def open_packs(self, packs: Iterable[int]) -> None:
        """Check size, header and block table of packs; raises DamagedError."""
        new = [pack for pack in packs if pack not in self.tables]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            self.tables.update(zip(new, pool.map(self._read_table, new), strict=True))

    def n_blocks(self, pack: int) -> int:
        """How many blocks a pack has."""
        return self.manifest.packs[pack].blocks.n_blocks

    def window_bytes(self, window: Window) -> int:
        """The size of a window, by addresses; the last block of a pack may be short."""
        end = min(window.end * BLOCK_BYTES, self.manifest.packs[window.pack].blocks.end)
        return end - window.begin * BLOCK_BYTES

    def fetch_all(
        self, windows: Iterable[Window], fetch: Callable[[Window], ByteArray] | None = None
    ) -> Arrivals:
        """The bytes of windows (or what ``fetch`` makes of one), several at once; to be closed."""
        todo, fetch = iter(windows), fetch or self.fetch
        pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="everstep-read")
        try:
            waiting: deque[tuple[Window, Future[ByteArray]]] = deque(
                (w, pool.submit(fetch, w)) for w in islice(todo, AT_ONCE)
            )
            while waiting:
                window, future = waiting.popleft()
                yield window, future.result()
                waiting.extend((w, pool.submit(fetch, w)) for w in islice(todo, 1))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def fetch(self, window: Window) -> ByteArray:
        """The bytes of one window, not verified yet; raises PackTruncatedError, OSError.

        Addresses that no byte has, behind the end of an extent, are zeros.
        """
        record = self.manifest.packs[window.pack]
        spans = list(record.blocks.spans(window.begin, window.end))
        size_bytes = self.window_bytes(window)
        if len(spans) == 1 and spans[0].n_bytes == size_bytes:
            return self._read(record.file, spans[0].offset, size_bytes)
        data = np.zeros(size_bytes, np.uint8)
        for span in spans:
            at = (span.block - window.begin) * BLOCK_BYTES
            data[at : at + span.n_bytes] = self._read(record.file, span.offset, span.n_bytes)
        return data

    def copy(
        self,
        requests: Sequence[Request],
        plan: dict[int, list[Piece]],
        needs: dict[int, Blocks],
        arrivals: Iterable[tuple[Window, ByteArray]],
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        """Verify windows as they arrive, in ascending order, and copy the pieces that they end."""
        done, done_bytes = dict.fromkeys(plan, 0), 0
        last: tuple[Window, ByteArray] | None = None
        for window, data in arrivals:
            self._check(window, data, needs[window.pack])
            pieces = plan[window.pack]
            begin, end = window.begin * BLOCK_BYTES, window.end * BLOCK_BYTES
            while done[window.pack] < len(pieces) and pieces[done[window.pack]].end <= end:
                piece = pieces[done[window.pack]]
                done[window.pack] += 1
                if piece.begin >= begin:
                    self._place(requests[piece.request], piece, data, piece.begin - begin)
                else:  # it begins in the window before: a piece is no longer than a block
                    assert last is not None
                    tail = last[1][piece.begin - begin :]
                    joined = np.concatenate([tail, data[: piece.end - begin]])
                    self._place(requests[piece.request], piece, joined, 0)
                item_bytes = self.manifest.tensors[requests[piece.request].name].spec.item_bytes
                done_bytes += piece.box.size * item_bytes
            last = (window, data)
            if on_bytes is not None:
                on_bytes(done_bytes)

    def _place(self, request: Request, piece: Piece, data: ByteArray, offset: int) -> None:
        item_bytes = self.manifest.tensors[request.name].spec.item_bytes
        target = request.target
        inside = piece.box.relative_to(request.box)
        copy_box(
            target.buffer,
            target.offset_bytes
            + sum(i * s for i, s in zip(inside, target.strides_bytes, strict=True)),
            target.strides_bytes,
            data,
            offset,
            dense_strides(piece.cell.shape, item_bytes),
            piece.box.shape,
            item_bytes,
            threads=self._threads,
        )

    def _check(self, window: Window, data: ByteArray, needed: Blocks) -> None:
        record, expected = self.manifest.packs[window.pack], self.tables[window.pack]
        for span in record.blocks.spans(window.begin, window.end):
            at = (span.block - window.begin) * BLOCK_BYTES
            found = crc32c_blocks(data[at : at + span.n_bytes], BLOCK_BYTES, threads=self._threads)
            blocks = slice(span.block, span.block + len(found))
            damaged = (found != expected[blocks]) & needed[blocks]
            for index in np.flatnonzero(damaged).tolist():
                block, where = span.block + index, self.folder.describe(record.file)
                raise BlockChecksumError(where, block, int(expected[block]), int(found[index]))

    def _read_table(self, pack: int) -> NDArray[np.uint32]:
        record = self.manifest.packs[pack]
        self._check_size(record.file, record.size_bytes)
        if record.table_file != record.file:
            self._check_size(record.table_file, record.table_file_bytes)
        crc, step = 0, WINDOW_BLOCKS * BLOCK_BYTES
        for begin in range(0, record.data_start, step):
            length = min(step, record.data_start - begin)
            crc = crc32c(self._read(record.file, begin, length), crc)
        table_bytes = record.table_file_bytes - record.table_start
        table = self._read(record.table_file, record.table_start, table_bytes)
        if crc32c(table, crc) != record.crc32c:
            where = self.folder.describe(record.table_file)
            raise PackHeaderError(where, "its header or checksum table does not match the manifest")
        return table.view("<u4").astype(np.uint32)

    def _check_size(self, file: str, size_bytes: int) -> None:
        where, found = self.folder.describe(file), self.folder.size(file)
        if found is None:
            raise PackTruncatedError(where, "the file is missing")
        if found != size_bytes:
            raise PackTruncatedError(where, f"it has {found} bytes, expected {size_bytes}")

    def _read(self, file: str, offset: int, length: int) -> ByteArray:
        try:
            data = self.folder.read(file, offset, length)
        except FileNotFoundError:
            raise PackTruncatedError(self.folder.describe(file), "the file is missing") from None
        if len(data) != length:
            raise PackTruncatedError(
                self.folder.describe(file), f"it ends before byte {offset + length}"
            )
        return np.frombuffer(data, np.uint8)
