"""How the work of ``everstep data tokenize`` is parted: a pure function of what is to be read.

A part is a run of text that one process tokenizes into shards of its own. Parts depend on the
files and on ``shard_tokens`` alone, never on the number of workers or on what is done already:
that is why the result is always the same.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from everstep.trainer.data.sources import FileFormat
from everstep.trainer.data.storage import StampFacts

_MOST_PARTS = 64
"""Small inputs are cut into about this many parts, so that many workers have something to do."""

_SMALLEST_PART_BYTES = 2**20
_BYTES_PER_TOKEN = 4
"""About what byte-pair encodings make of a token."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A file or folder to be tokenized, and where it may be cut."""

    path: str
    format: FileFormat
    named: bool
    size_bytes: int
    stamps: tuple[StampFacts, ...]
    """Of its files."""
    trusted: bool
    """Whether equal stamps later will mean equal bytes."""
    cuts: tuple[tuple[int, int], ...] = ()
    """(position, bytes before it), ascending, where it can be cut, both ends included."""
    any_byte: bool = False
    """It can be cut at any byte: lines know where they begin."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """A file, or some of its pieces (bytes, row groups, rows) from ``start`` to before ``stop``."""

    path: str
    format: FileFormat
    named: bool
    size_bytes: int
    """An estimate where a file is cut."""
    stamps: tuple[StampFacts, ...]
    start: int = 0
    stop: int | None = None
    """None: the whole of it."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one process tokenizes in one go."""

    number: int
    spans: tuple[Span, ...]
    trusted: bool

    @property
    def size_bytes(self) -> int:
        """Bytes to read, about."""
        return sum(span.size_bytes for span in self.spans)

    def key(self, identity: str) -> str:
        """Hex digest of everything that decides the tokens of this part."""
        facts = [identity, self.number, [asdict(span) for span in self.spans]]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def part_bytes(total_bytes: int, shard_tokens: int) -> int:
    """Bytes that a part should have."""
    largest = _BYTES_PER_TOKEN * shard_tokens
    return max(min(total_bytes // _MOST_PARTS, largest), min(_SMALLEST_PART_BYTES, largest))


def plan_parts(units: Sequence[Unit], shard_tokens: int) -> list[Part]:
    """Cuts and groups ``units``, in their order, into parts of similar size."""
    wanted = part_bytes(sum(unit.size_bytes for unit in units), shard_tokens)
    parts: list[Part] = []
    spans: list[Span] = []
    size_bytes, trusted = 0, True
    for unit in units:
        for span in _spans(unit, wanted):
            spans.append(span)
            trusted = trusted and unit.trusted
            size_bytes += span.size_bytes
            if size_bytes >= wanted:
                parts.append(Part(number=len(parts), spans=tuple(spans), trusted=trusted))
                spans, size_bytes, trusted = [], 0, True
    if spans:
        parts.append(Part(number=len(parts), spans=tuple(spans), trusted=trusted))
    return parts


def _spans(unit: Unit, wanted: int) -> list[Span]:
    def span(start: int, stop: int | None, size_bytes: int) -> Span:
        return Span(
            path=unit.path,
            format=unit.format,
            named=unit.named,
            size_bytes=size_bytes,
            stamps=unit.stamps,
            start=start,
            stop=stop,
        )

    if unit.size_bytes <= wanted or not (unit.any_byte or unit.cuts):
        return [span(0, None, unit.size_bytes)]
    if unit.any_byte:
        starts = range(0, unit.size_bytes, wanted)
        ends = [min(start + wanted, unit.size_bytes) for start in starts]
        return [span(s, e, e - s) for s, e in zip(starts, ends, strict=True)]
    spans = []
    start, before_bytes = unit.cuts[0]
    for stop, until_bytes in unit.cuts[1:]:
        size_bytes = until_bytes - before_bytes
        if size_bytes >= wanted or stop == unit.cuts[-1][0]:
            spans.append(span(start, stop, size_bytes))
            start, before_bytes = stop, until_bytes
    return spans
