"""Reading every byte of a checkpoint, to find all of its damage instead of the first."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from everstep.checkpoint.extents import Span
from everstep.checkpoint.kernels import crc32c, crc32c_blocks
from everstep.checkpoint.manifest import Manifest
from everstep.checkpoint.pack import BLOCK_BYTES, PackRecord
from everstep.checkpoint.views.index_files import index_files

RUN_BYTES = 16 * BLOCK_BYTES
"""What is read at a time."""


class StepFiles(Protocol):
    """The files of one checkpoint, by name."""

    def size(self, name: str) -> int | None:
        """Size in bytes; None where there is no such file."""
        ...

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Bytes from an offset on; fewer where the file ends before. Raises OSError."""
        ...


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Something that cannot be read as it was written."""

    file: str
    """Name of the pack, or of a file of the views."""
    block: int | None
    """Number of the block; None: nothing of the file can be trusted."""
    problem: str
    tensors: tuple[str, ...]
    """Names of all tensors that have a part in it."""


def verify_packs(
    files: StepFiles,
    manifest: Manifest,
    *,
    threads: int = 1,
    on_bytes: Callable[[int], None] | None = None,
) -> list[Damage]:
    """Read all packs, and compare every block with its checksum: all damage, in order of packs.

    That the tensors are covered exactly once, and that the packs are as large as this makes them,
    was checked when the manifest was decoded.

    Args:
        files: of the checkpoint.
        manifest: of the checkpoint.
        threads: that compute checksums.
        on_bytes: called with the number of bytes of packs that have been dealt with so far.
    """
    report = on_bytes or (lambda _: None)
    found: list[Damage] = []
    before_bytes = 0
    for number, record in enumerate(manifest.packs):
        held = _Held(manifest, number)
        done_bytes = 0
        for n_bytes, block, problem in _examine(files, record, threads):
            done_bytes += n_bytes
            report(before_bytes + done_bytes)
            if problem is not None:
                found.append(
                    Damage(
                        file=record.file, block=block, problem=problem, tensors=held.tensors(block)
                    )
                )
        before_bytes += record.size_bytes
        report(before_bytes)
    return found


def verify_index(files: StepFiles, manifest: Manifest) -> list[Damage]:
    """Compare the files of the views with what the manifest makes them; none of ours reads them."""
    found = []
    for name, data in index_files(manifest).items():
        try:
            size_bytes = files.size(name)
            if size_bytes is None:
                problem = "the file is missing"
            elif size_bytes == len(data) and files.read(name, 0, size_bytes) == data:
                continue
            else:
                problem = "it is not what the manifest makes it: TensorStore cannot use it"
        except OSError as error:
            problem = _sentence(error)
        found.append(Damage(file=name, block=None, problem=problem, tensors=()))
    return found


def _examine(
    files: StepFiles, record: PackRecord, threads: int
) -> Iterator[tuple[int, int | None, str | None]]:
    """(bytes that were read, block, problem) of runs without a problem, and of every problem."""
    try:
        problem = _size_problem(files, record)
        if problem is not None:
            yield 0, None, problem
            return
        header = files.read(record.file, 0, record.data_start)
        table_bytes = record.table_file_bytes - record.table_start
        table = files.read(record.table_file, record.table_start, table_bytes)
    except OSError as error:
        yield 0, None, _sentence(error)
        return
    if crc32c(table, crc32c(header)) != record.crc32c:
        yield 0, None, "its header or checksum table does not match the manifest"
        return
    expected = np.frombuffer(table, dtype="<u4")
    for extent in record.blocks.spans(0, record.blocks.n_blocks):
        for run in _cut(extent, RUN_BYTES):
            try:
                yield from _examine_run(files, record.file, run, expected, threads)
            except OSError:  # only some of these blocks, perhaps
                for block in _cut(run, BLOCK_BYTES):
                    try:
                        yield from _examine_run(files, record.file, block, expected, threads)
                    except OSError as error:
                        yield block.n_bytes, block.block, _sentence(error)


def _size_problem(files: StepFiles, record: PackRecord) -> str | None:
    """What is wrong with the size of a pack, or of the file of its checksums."""
    whose = {record.table_file: "the file of its checksums ", record.file: ""}
    expected = {record.table_file: record.table_file_bytes, record.file: record.size_bytes}
    for name, size_bytes in expected.items():
        found = files.size(name)
        if found is None:
            return f"{whose[name] or 'the file '}is missing"
        if found != size_bytes:
            return f"{whose[name] or 'it '}has {found} bytes, expected {size_bytes}"
    return None


def _cut(span: Span, n_bytes: int) -> Iterator[Span]:
    """Parts of whole blocks, of at most so many bytes."""
    for at in range(0, span.n_bytes, n_bytes):
        length = min(n_bytes, span.n_bytes - at)
        yield Span(span.block + at // BLOCK_BYTES, span.offset + at, length)


def _examine_run(
    files: StepFiles,
    file: str,
    run: Span,
    expected: npt.NDArray[np.uint32],
    threads: int,
) -> Iterator[tuple[int, int | None, str | None]]:
    """Blocks of one extent; raises OSError before it yields anything."""
    data = files.read(file, run.offset, run.n_bytes)
    if len(data) != run.n_bytes:
        raise OSError(f"it ends {run.n_bytes - len(data)} bytes too early")
    found = crc32c_blocks(data, BLOCK_BYTES, threads=threads)
    yield run.n_bytes, None, None
    for index in np.flatnonzero(found != expected[run.block : run.block + len(found)]).tolist():
        block = run.block + index
        yield 0, block, f"its checksum is {found[index]:08x}, expected {expected[block]:08x}"


class _Held:
    """Which tensors lie where in a pack."""

    def __init__(self, manifest: Manifest, number: int) -> None:
        self._manifest, self._number = manifest, number

    def tensors(self, block: int | None) -> tuple[str, ...]:
        """Names of the tensors that have bytes in a block; None: in the pack."""
        names = {
            name
            for begin, end, name in self._ranges
            if block is None or (begin < (block + 1) * BLOCK_BYTES and end > block * BLOCK_BYTES)
        }
        return tuple(sorted(names))

    @cached_property
    def _ranges(self) -> list[tuple[int, int, str]]:
        """[begin, end) of its addresses, and the name of the tensor."""
        starts = self._manifest.pack_indexes[self._number].starts
        return [(start, start + f.size_bytes, f.spec.name) for start, f in starts.values()]


def _sentence(error: OSError) -> str:
    return error.strerror or str(error)
