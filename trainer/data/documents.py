"""Documents of a corpus: which files are text, in which order, and their text in pieces.

The order is that of a keyed hash of the contents: arbitrary, yet the same wherever the same text
lies under whatever names, on every file system and machine.
"""

import codecs
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from everstep.trainer.data.sources import SourceFile, Sources
from everstep.trainer.data.stamps import FileStamp
from everstep.trainer.errors import DataError

PIECE_BYTES = 2**20
"""Documents are read, and cut for the tokenizer, in pieces of about this many bytes."""

_ORDER_KEY = b"everstep document order 1\0"


@dataclass(frozen=True)
class Piece:
    """A run of whole UTF-8 characters of one document, never empty."""

    text: bytes
    ends_document: bool


@dataclass(frozen=True)
class Document:
    """A text file with at least one byte."""

    path: str
    size_bytes: int
    digest: str
    """Hex keyed hash of the contents; also the sort key."""


@dataclass(frozen=True)
class Texts:
    """All text of a corpus."""

    documents: tuple[Document, ...]
    """In corpus order; equal documents stay, side by side."""
    skipped: tuple[str, ...]
    """Files in folders or globs that are not UTF-8 text, or unreadable."""
    digest: str
    """Hex digest of all contents and their order, whatever the files are called."""

    @property
    def size_bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return sum(document.size_bytes for document in self.documents)


@dataclass(frozen=True)
class Known:
    """What reading a file told about it."""

    stamp: FileStamp
    digest: str | None
    """Of its contents; None: not text."""


Index = dict[str, Known]
"""Files read before, by path; only those whose stamp may be trusted."""

Advance = Callable[[int, bool], None]
"""Told how many bytes are dealt with, and whether they had to be read."""


class DocumentChangedError(Exception):
    """A file is not what it was when it was identified."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


class _NotTextError(Exception):
    """The file is no UTF-8 text; says where."""


def identify(sources: Sources, known: Index, advance: Advance) -> tuple[Texts, Index]:
    """Reads every file that ``known`` does not vouch for; finds the documents and their order.

    Returns:
        The texts, and the index to know next time.

    Raises:
        DataError: a file that the user named is unreadable or not text, or there is no text.
    """
    documents: list[Document] = []
    skipped: list[str] = []
    index: Index = {}
    for file in sources.files:
        entry, trusted = _identify_file(file, known.get(file.path), advance)
        if entry is None or entry.digest is None:
            skipped.append(file.path)
        elif entry.stamp.size_bytes:
            documents.append(Document(file.path, entry.stamp.size_bytes, entry.digest))
        if entry is not None and trusted:
            index[file.path] = entry
    if not documents:
        raise DataError(
            f"data.source: no text in {sources.name} ({len(sources.files)} files found, "
            f"{len(skipped)} of them unreadable or not UTF-8, the others empty); name UTF-8 text "
            "files"
        )
    documents.sort(key=lambda document: (document.digest, document.path))
    everything = "\n".join(document.digest for document in documents)
    digest = hashlib.sha256(everything.encode()).hexdigest()
    return Texts(tuple(documents), tuple(skipped), digest), index


def read_pieces(documents: Iterable[Document], advance: Advance) -> Iterator[Piece]:
    """The text of all documents, in order, in pieces that end at line ends where there are any.

    Where a piece ends depends on the contents alone, so a tokenizer sees the same pieces always.

    Raises:
        DocumentChangedError: a file is gone or has other contents than its digest says; possibly
            after some of its pieces were handed out.
    """
    for document in documents:
        try:
            yield from _pieces_of(document, advance)
        except OSError as error:
            raise DocumentChangedError(document.path) from error


def encode_index(index: Index) -> Any:
    """JSON-able form of an index."""
    return {
        path: [k.stamp.size_bytes, k.stamp.mtime_ns, k.stamp.ctime_ns, k.stamp.inode, k.digest]
        for path, k in index.items()
    }


def decode_index(record: Any) -> Index:
    """The inverse of ``encode_index``; None, for a missing record, is an empty index."""
    return {path: Known(FileStamp(*entry[:4]), entry[4]) for path, entry in (record or {}).items()}


def _identify_file(
    file: SourceFile, known: Known | None, advance: Advance
) -> tuple[Known | None, bool]:
    """What the file is, None if it cannot be read, and whether that may be trusted next time."""
    now_ns = time.time_ns()
    try:
        stamp = FileStamp.of(file.path)
        if known is not None and known.stamp == stamp and (known.digest or not file.named):
            advance(stamp.size_bytes, False)
            return known, True
        digest, size_bytes = _hash_text(file.path)
        after = FileStamp.of(file.path)
    except _NotTextError as error:
        advance(stamp.size_bytes, True)
        if file.named:
            raise DataError(
                f"data.source: '{file.path}' is not UTF-8 text ({error}); convert it (for example "
                "with iconv) or leave it out"
            ) from error
        return Known(stamp, None), stamp.settled(now_ns)
    except OSError as error:
        if file.named:
            raise DataError(
                f"data.source: cannot read '{file.path}': {error.strerror}; make it readable or "
                "leave it out"
            ) from error
        return None, False
    advance(stamp.size_bytes, True)
    read = FileStamp(size_bytes, stamp.mtime_ns, stamp.ctime_ns, stamp.inode)
    return Known(read, digest), read == after and stamp.settled(now_ns)


def _hash_text(path: str) -> tuple[str, int]:
    """Hex keyed hash and size in bytes; raises OSError or _NotTextError."""
    hasher = hashlib.sha256(_ORDER_KEY)
    decoder = codecs.getincrementaldecoder("utf-8")()
    size_bytes = 0
    with open(path, "rb") as file:
        while True:
            chunk = file.read(PIECE_BYTES)
            undecoded = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                position = size_bytes - undecoded + error.start
                raise _NotTextError(f"invalid at byte {position}") from error
            if b"\0" in chunk:
                raise _NotTextError(f"a zero byte at byte {size_bytes + chunk.index(0)}")
            if not chunk:
                return hasher.hexdigest(), size_bytes
            hasher.update(chunk)
            size_bytes += len(chunk)


def _pieces_of(document: Document, advance: Advance) -> Iterator[Piece]:
    hasher = hashlib.sha256(_ORDER_KEY)
    held = b""
    with open(document.path, "rb") as file:
        while chunk := file.read(PIECE_BYTES):
            if file.tell() > document.size_bytes:  # it grows, perhaps without end
                break
            hasher.update(chunk)
            text = held + chunk
            if len(text) > PIECE_BYTES:
                cut = _last_cut(text)
                yield Piece(text[:cut], ends_document=False)
                text = text[cut:]
            held = text
            advance(len(chunk), True)
    if hasher.hexdigest() != document.digest:
        raise DocumentChangedError(document.path)
    yield Piece(held, ends_document=True)


def _last_cut(text: bytes) -> int:
    """After the last line end, or else before the last character; neither side is empty."""
    after_line = text.rfind(b"\n", 0, len(text) - 1) + 1
    if after_line:
        return after_line
    start = len(text) - 1
    while text[start] & 0xC0 == 0x80:
        start -= 1
    return start
