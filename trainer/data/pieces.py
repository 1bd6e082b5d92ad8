"""Files of text read in pieces, and hashed and counted on the way.

A piece is what a tokenizer gets at once. Where one ends depends on the contents alone.
"""

import codecs
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from everstep.trainer.data.rows import Done, Row
from everstep.trainer.data.storage import Storage
from everstep.trainer.errors import DataError

PIECE_BYTES = 2**20
"""Documents are read, and cut for the tokenizer, in pieces of about this many bytes."""

CONTENTS_KEY = b"everstep document order 1\0"
"""Of the keyed hash of contents."""

_SKIPPED_SHOWN = 3

Count = Callable[[int], None]
"""Told how many more bytes are read."""


@dataclass(frozen=True)
class Piece:
    """A run of whole UTF-8 characters of one document, never empty."""

    text: bytes
    ends_document: bool


@dataclass
class Tally:
    """Counts of what was handed out."""

    documents: int = 0
    text_bytes: int = 0
    bad_rows: int = 0
    bad_examples: list[str] = field(default_factory=list)
    """What is wrong with the first bad rows, and where they are."""


class NotTextError(Exception):
    """The file is no UTF-8 text; says where."""


def pieces_of_rows(rows: Iterable[Row], path: str, skip_bad: bool, tally: Tally) -> Iterator[Piece]:
    """Each row a document; empty ones are none, bad ones are an error or skipped and counted."""
    for row in rows:
        if row.problem:
            told = f"'{path}', {row.place}: the row {row.problem}"
            if not skip_bad:
                raise DataError(
                    f"data.source: {told}; correct it, set text_key to the field that holds the "
                    "text, or set on_bad_rows: skip"
                )
            tally.bad_rows += 1
            if len(tally.bad_examples) < _SKIPPED_SHOWN:
                tally.bad_examples.append(told)
        elif row.text:
            yield from counted(_cut(row.text), tally)


def pieces_of_file(file: IO[bytes]) -> Iterator[Piece]:
    """The text of an open file that is known to be text, as one document. Raises OSError."""
    held = b""
    while chunk := file.read(PIECE_BYTES):
        text = held + chunk
        if len(text) > PIECE_BYTES:
            cut = _last_cut(text)
            yield Piece(text[:cut], ends_document=False)
            text = text[cut:]
        held = text
    if held:
        yield Piece(held, ends_document=True)


def why_not_text(storage: Storage, path: str) -> str:
    """What makes a file no UTF-8 text, empty if it is; reads all of it. Raises OSError."""
    try:
        hash_file(path, storage, must_be_text=True)
    except NotTextError as error:
        return str(error)
    return ""


def hash_file(path: str, storage: Storage, must_be_text: bool) -> tuple[str, int]:
    """Hex keyed hash and size in bytes; raises OSError or NotTextError."""
    hasher = hashlib.sha256(CONTENTS_KEY)
    decoder = codecs.getincrementaldecoder("utf-8")()
    size_bytes = 0
    with storage.open(path) as file:
        while True:
            chunk = file.read(PIECE_BYTES)
            if must_be_text:
                _check_text(decoder, chunk, size_bytes)
            if not chunk:
                return hasher.hexdigest(), size_bytes
            hasher.update(chunk)
            size_bytes += len(chunk)


def _check_text(decoder: codecs.IncrementalDecoder, chunk: bytes, before_bytes: int) -> None:
    undecoded = len(decoder.getstate()[0])
    try:
        decoder.decode(chunk, final=not chunk)
    except UnicodeDecodeError as error:
        position = before_bytes - undecoded + error.start
        raise NotTextError(f"invalid at byte {position}") from error
    if b"\0" in chunk:
        raise NotTextError(f"a zero byte at byte {before_bytes + chunk.index(0)}")


class CountedFile(io.RawIOBase):
    """Reads another file, and tells how much of it is read."""

    def __init__(self, file: IO[bytes], count: Count) -> None:
        self._file = file
        self._count = count

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _next(self, most_bytes: int) -> bytes:
        data = self._file.read(most_bytes)
        self._count(len(data))
        return data


class HashedFile(CountedFile):
    """A counted file read from start to end, no further than a little after its size, and hashed.

    Args:
        file: At its start.
        size_bytes: What it had when it was identified.
        count: Told of what is read.
    """

    def __init__(self, file: IO[bytes], size_bytes: int, count: Count) -> None:
        super().__init__(file, count)
        self._left_bytes = size_bytes + 1  # it may grow, perhaps without end
        self._hasher = hashlib.sha256(CONTENTS_KEY)

    @property
    def digest(self) -> str:
        """Hex digest of what was read."""
        return self._hasher.hexdigest()

    def seekable(self) -> bool:
        return False  # bytes are hashed in the order of the file

    def read_rest(self) -> None:
        """Reads what a decompressor did not need; works on a closed object, too."""
        while self._next(PIECE_BYTES):
            pass

    def _next(self, most_bytes: int) -> bytes:
        data = super()._next(min(most_bytes, PIECE_BYTES, self._left_bytes))
        self._left_bytes -= len(data)
        self._hasher.update(data)
        return data


def count_fractions(size_bytes: int, count: Count) -> Done:
    """Tells ``count`` in bytes what it is told in fractions of ``size_bytes`` done so far."""
    told_bytes = 0

    def done(fraction: float) -> None:
        nonlocal told_bytes
        before_bytes, told_bytes = told_bytes, int(fraction * size_bytes)
        count(told_bytes - before_bytes)

    return done


def counted(pieces: Iterable[Piece], tally: Tally) -> Iterator[Piece]:
    """``pieces`` as they are, noted in ``tally``."""
    for piece in pieces:
        tally.text_bytes += len(piece.text)
        tally.documents += piece.ends_document
        yield piece


def _cut(text: bytes) -> Iterator[Piece]:
    """The pieces of a document that is in memory."""
    start = 0
    while len(text) - start > PIECE_BYTES:
        after = start + _last_cut(text[start : start + PIECE_BYTES + 1])
        yield Piece(text[start:after], ends_document=False)
        start = after
    yield Piece(text[start:], ends_document=True)


def _last_cut(text: bytes) -> int:
    """After the last line end, or else before the last character; neither side is empty."""
    after_line = text.rfind(b"\n", 0, len(text) - 1) + 1
    if after_line:
        return after_line
    start = len(text) - 1
    while text[start] & 0xC0 == 0x80:
        start -= 1
    return start
