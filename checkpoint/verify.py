"""Reading every byte of a checkpoint, to find all of its damage instead of the first."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from everstep.checkpoint.digest import StateDigest, box_digest, combine
from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.errors import BlockChecksumError, DamagedError
from everstep.checkpoint.layout import Box, Fragment, TensorSpec
from everstep.checkpoint.pack import BLOCK_BYTES
from everstep.checkpoint.pieces import PIECE_BYTES, pieces
from everstep.checkpoint.step_reader import StepReader


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Something that cannot be read as it was written."""

    file: str
    """Name of the pack."""
    block: int | None
    """Number of the block; None: nothing of the pack can be trusted."""
    problem: str
    """One sentence."""
    tensors: tuple[str, ...]
    """Names of all tensors that have a part in it."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What reading everything has shown."""

    data_bytes: int
    """Size of the data of all packs."""
    damages: tuple[Damage, ...]
    digest: StateDigest | None
    """Where it was asked for, and nothing is damaged."""


def verify_step(
    reader: StepReader,
    *,
    digest: bool = False,
    on_bytes: Callable[[int], None] | None = None,
) -> Verification:
    """Read every block of every pack, and compare it with its checksum.

    That the tensors are covered exactly once, and the packs are as large as that makes them, was
    checked when the manifest was decoded.

    Args:
        reader: of the checkpoint; not used before, since a block is verified once per reader.
        digest: whether to compute the digest of the state, too.
        on_bytes: called with the number of bytes that have been dealt with since.
    """
    report = on_bytes or (lambda _: None)
    damages: list[Damage] = []
    sums = {stored.spec: 0 for stored in reader.manifest.tensors.values()} if digest else None
    for number in range(len(reader.manifest.packs)):
        damages += _verify_pack(reader, number, sums, report)
    return Verification(
        data_bytes=sum(record.data_bytes for record in reader.manifest.packs),
        damages=tuple(damages),
        digest=combine(sums, reader.manifest.objects) if sums is not None and not damages else None,
    )


def _verify_pack(
    reader: StepReader,
    number: int,
    sums: dict[TensorSpec, int] | None,
    report: Callable[[int], None],
) -> Iterator[Damage]:
    record, held = reader.manifest.packs[number], _Held(reader, number)
    done = 0
    try:
        if not record.data_bytes:
            reader.verify(number)  # its header
        for fragment, begin, piece in held.pieces():
            size_bytes = piece.size * fragment.spec.item_bytes
            try:
                data = reader.read(fragment.spec.name, piece)
            except BlockChecksumError:
                yield from held.damaged_blocks(fragment, begin, piece)
            except OSError:
                if not done:
                    raise
                yield from held.damaged_blocks(fragment, begin, piece)
            else:
                if sums is not None:
                    sums[fragment.spec] += box_digest(fragment.spec, piece, data)
            done += size_bytes
            report(size_bytes)
    except (DamagedError, OSError) as error:
        report(record.data_bytes - done)
        yield Damage(
            file=record.file,
            block=None,
            problem=_problem(error),
            tensors=held.tensors(0, record.data_bytes),
        )


class _Held:
    """What a pack holds, in the order in which it lies there."""

    def __init__(self, reader: StepReader, number: int) -> None:
        self._reader, self._record = reader, reader.manifest.packs[number]
        self._starts = sorted(
            reader.manifest.pack_indexes[number].starts.values(), key=lambda item: item[0]
        )
        self._known: set[int] = set()

    def pieces(self) -> Iterator[tuple[Fragment, int, Box]]:
        """(fragment, byte offset in the data, box) of runs of bounded size."""
        for start, fragment in self._starts:
            begin = start
            for piece in pieces(fragment.box, PIECE_BYTES // fragment.spec.item_bytes):
                yield fragment, begin, piece
                begin += piece.size * fragment.spec.item_bytes

    def tensors(self, begin: int, end: int) -> tuple[str, ...]:
        """Names of the tensors that have bytes in a range of the data."""
        names = {f.spec.name for s, f in self._starts if s < end and s + f.size_bytes > begin}
        return tuple(sorted(names))

    def damaged_blocks(self, fragment: Fragment, begin: int, piece: Box) -> Iterator[Damage]:
        """The blocks of a run that cannot be read, those known already left out.

        One item is read of each block, which verifies the whole block.
        """
        item_bytes = fragment.spec.item_bytes
        end = begin + piece.size * item_bytes
        for block in range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
            item = (max(begin, block * BLOCK_BYTES) - begin) // item_bytes
            try:
                self._read_item(fragment, piece, item)
            except (DamagedError, OSError) as error:
                if block in self._known:
                    continue
                self._known.add(block)
                yield Damage(
                    file=self._record.file,
                    block=block,
                    problem=_problem(error),
                    tensors=self.tensors(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES),
                )

    def _read_item(self, fragment: Fragment, piece: Box, number: int) -> ByteArray:
        inside = np.unravel_index(number, piece.shape)
        offset = tuple(o + int(i) for o, i in zip(piece.offset, inside, strict=True))
        return self._reader.read(fragment.spec.name, Box(offset, (1,) * len(offset)))


def _problem(error: Exception) -> str:
    if isinstance(error, DamagedError):
        return error.what
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
