"""Reading every byte of a checkpoint, to find all of its damage instead of the first."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from everstep.checkpoint.kernels import crc32c, crc32c_blocks
from everstep.checkpoint.manifest import Manifest
from everstep.checkpoint.pack import BLOCK_BYTES, PackRecord, pack_order, pack_starts
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
        size_bytes = files.size(record.file)
        if size_bytes is None:
            yield 0, None, "the file is missing"
            return
        if size_bytes != record.size_bytes:
            yield 0, None, f"it has {size_bytes} bytes, expected {record.size_bytes}"
            return
        table_start = record.data_start + record.data_bytes
        header = files.read(record.file, 0, record.data_start)
        table = files.read(record.file, table_start, record.size_bytes - table_start)
    except OSError as error:
        yield 0, None, _sentence(error)
        return
    if crc32c(table, crc32c(header)) != record.crc32c:
        yield 0, None, "its header or checksum table does not match the manifest"
        return
    expected = np.frombuffer(table, dtype="<u4")
    for begin in range(0, record.data_bytes, RUN_BYTES):
        end = min(begin + RUN_BYTES, record.data_bytes)
        try:
            yield from _examine_run(files, record, begin, end, expected, threads)
        except OSError:  # only some of these blocks, perhaps
            for at in range(begin, end, BLOCK_BYTES):
                stop = min(at + BLOCK_BYTES, end)
                try:
                    yield from _examine_run(files, record, at, stop, expected, threads)
                except OSError as error:
                    yield stop - at, at // BLOCK_BYTES, _sentence(error)


def _examine_run(
    files: StepFiles,
    record: PackRecord,
    begin: int,
    end: int,
    expected: npt.NDArray[np.uint32],
    threads: int,
) -> Iterator[tuple[int, int | None, str | None]]:
    """Whole blocks of the data; raises OSError before it yields anything."""
    data = files.read(record.file, record.data_start + begin, end - begin)
    if len(data) != end - begin:
        raise OSError(f"it ends {end - begin - len(data)} bytes too early")
    found = crc32c_blocks(data, BLOCK_BYTES, threads=threads)
    first = begin // BLOCK_BYTES
    yield end - begin, None, None
    for index in np.flatnonzero(found != expected[first : first + len(found)]).tolist():
        block = first + index
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
        """[begin, end) in the data, and the name of the tensor."""
        ordered = pack_order(self._manifest.pack_indexes[self._number].fragments)
        starts, _ = pack_starts(ordered)
        return [
            (start, start + fragment.size_bytes, fragment.spec.name)
            for start, fragment in zip(starts, ordered, strict=True)
        ]


def _sentence(error: OSError) -> str:
    return error.strerror or str(error)
