"""Documents of a corpus: which files hold them, what tells them apart, and their order.

A text file is one document; rows of other files are one each, in the order of the file. The order
of the files is that of a keyed hash of their contents: arbitrary, yet the same wherever the same
files lie under whatever names, on every file system and machine.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from everstep.trainer.data.pieces import (
    CONTENTS_KEY,
    PIECE_BYTES,
    Count,
    HashedFile,
    NotTextError,
    Piece,
    Tally,
    count_fractions,
    counted,
    hash_file,
    pieces_of_file,
    pieces_of_rows,
)
from everstep.trainer.data.problems import not_text, unreadable
from everstep.trainer.data.rows import Row, hf_rows, jsonl_rows, parquet_rows
from everstep.trainer.data.sources import FileFormat, SourceFile, Sources
from everstep.trainer.data.storage import StampFacts, Storage, is_url
from everstep.trainer.errors import DataError


@dataclass(frozen=True)
class Document:
    """A text file with at least one byte, or a file or folder of rows."""

    path: str
    size_bytes: int
    digest: str
    """Hex keyed hash of the contents; also the sort key."""
    format: FileFormat = "text"
    stamps: tuple[StampFacts | None, ...] = field(default=(), compare=False)
    """Of each of its files when it was identified, where reading them does not show changes."""
    source: SourceFile = field(default=SourceFile("", True), compare=False, repr=False)


@dataclass(frozen=True)
class Texts:
    """All text of a source."""

    documents: tuple[Document, ...]
    """In corpus order; equal documents stay, side by side."""
    skipped: tuple[str, ...]
    """Files in folders or globs that are not UTF-8 text, or unreadable."""
    digest: str
    """Hex digest of all contents and their order, whatever the files are called."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all files; for text files those of their text."""
        return sum(document.size_bytes for document in self.documents)


@dataclass(frozen=True)
class Known:
    """What reading a file told about it."""

    stamp: StampFacts | None
    """None: nothing tells whether it has changed since."""
    digest: str | None
    """Of its contents; None: not text."""
    size_bytes: int


Index = dict[str, Known]
"""Files read before, by path; only those whose stamp may be trusted."""

Advance = Callable[[int, bool], None]
"""Told how many bytes are dealt with, and whether they had to be read."""


class DocumentChangedError(Exception):
    """A file is not what it was when it was identified."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


def identify(
    sources: Sources, known: Index, advance: Advance, recheck: bool = True
) -> tuple[Texts, Index]:
    """Reads every file that ``known`` does not vouch for; finds the documents and their order.

    Without ``recheck``, remote files are taken for what ``known`` says without being asked.

    Returns:
        The texts, and the index to know next time.

    Raises:
        DataError: a file that the user named is unreadable or not text, or there is no text.
    """
    documents: list[Document] = []
    skipped: list[str] = []
    index: Index = {}
    for file in sources.files:
        entries = []
        for path in file.members or (file.path,):
            entry, trusted = _identify_file(sources, file, path, known.get(path), advance, recheck)
            entries.append(entry)
            if entry is not None and trusted:
                index[path] = entry
            elif entry is not None and is_url(path):  # for those who do not check again
                index[path] = replace(entry, stamp=None)
        document = _document(file, entries)
        if document is None:
            skipped.append(file.path)
        elif document.size_bytes:
            documents.append(document)
    if not documents:
        raise DataError(
            f"data.source: no text in {sources.name} ({len(sources.files)} files found, "
            f"{len(skipped)} of them unreadable or not UTF-8, the others empty); name UTF-8 text "
            "files"
        )
    documents.sort(key=lambda document: (document.digest, document.path))
    how = f"{sources.entry.text_key}\0{sources.entry.on_bad_rows}"
    everything = "\n".join(
        d.digest if d.format == "text" else f"{d.format}\0{how}\0{d.digest}" for d in documents
    )
    digest = hashlib.sha256(everything.encode()).hexdigest()
    return Texts(tuple(documents), tuple(skipped), digest), index


def read_pieces(
    sources: Sources, documents: Iterable[Document], advance: Advance, tally: Tally
) -> Iterator[Piece]:
    """The text of all documents, in order, in pieces that end at line ends where there are any.

    Where a piece ends depends on the contents alone, so a tokenizer sees the same pieces always.

    Raises:
        DocumentChangedError: a file is gone or has other contents than its digest says; possibly
            after some of its pieces were handed out.
        DataError: a row holds no text, and such rows are not to be skipped.
    """
    for document in documents:
        try:
            if document.format == "text":
                storage = sources.storages.of(document.path)
                yield from counted(_pieces_of_text(storage, document, advance), tally)
            else:
                rows = _rows_of(sources, document, advance)
                skip = sources.entry.on_bad_rows == "skip"
                yield from pieces_of_rows(rows, document.path, skip, tally)
        except OSError as error:
            raise DocumentChangedError(document.path) from error


def encode_index(index: Index) -> Any:
    """JSON-able form of an index."""
    return {path: [k.stamp, k.size_bytes, k.digest] for path, k in index.items()}


def decode_index(record: Any) -> Index:
    """The inverse of ``encode_index``; None, for a missing record, is an empty index."""
    return {
        path: Known(stamp, digest, size_bytes)
        for path, (stamp, size_bytes, digest) in (record or {}).items()
    }


def _document(file: SourceFile, entries: list[Known | None]) -> Document | None:
    """What the files of ``file`` make; None if one is unreadable or not text."""
    found = [entry for entry in entries if entry is not None and entry.digest is not None]
    if len(found) != len(entries):
        return None
    size_bytes = sum(entry.size_bytes for entry in found)
    digest = str(found[0].digest)
    if file.members:
        names = [path.removeprefix(file.path) for path in file.members]
        facts = [f"{name} {entry.digest}" for name, entry in zip(names, found, strict=True)]
        digest = hashlib.sha256(CONTENTS_KEY + "\n".join(facts).encode()).hexdigest()
    stamps = tuple(entry.stamp for entry in found)
    return Document(file.path, size_bytes, digest, file.format, stamps, file)


def _identify_file(
    sources: Sources,
    file: SourceFile,
    path: str,
    known: Known | None,
    advance: Advance,
    recheck: bool,
) -> tuple[Known | None, bool]:
    """What a file is, None if it cannot be read, and whether that may be trusted next time."""
    storage = sources.storages.of(path)
    if known is not None and not recheck and is_url(path):
        return known, True
    try:
        stamp, trusted = storage.stamp(path)
        if known is not None and known.stamp == stamp and (known.digest or not file.named):
            advance(known.size_bytes, False)
            return known, True
        digest, size_bytes = hash_file(path, storage, must_be_text=file.format == "text")
        after, _ = storage.stamp(path)
    except NotTextError as error:
        size_bytes = storage.size_bytes(path) or 0
        advance(size_bytes, True)
        if file.named:
            raise not_text(path, str(error)) from error
        return Known(stamp, None, size_bytes), trusted
    except OSError as error:
        if file.named:
            raise unreadable(path, error) from error
        return None, False
    advance(size_bytes, True)
    unchanged = stamp == after and stamp[0] in (None, size_bytes)
    return Known(stamp, digest, size_bytes), trusted and unchanged


def _pieces_of_text(storage: Storage, document: Document, advance: Advance) -> Iterator[Piece]:
    last: Piece | None = None  # handed out only when the whole file was what it was
    with storage.open(document.path) as file:
        hashing = HashedFile(file, document.size_bytes, _reading(advance))
        for piece in pieces_of_file(io.BufferedReader(hashing, PIECE_BYTES)):
            if last is not None:
                yield last
            last = piece
    if last is None or hashing.digest != document.digest:
        raise DocumentChangedError(document.path)
    yield last


def _rows_of(sources: Sources, document: Document, advance: Advance) -> Iterator[Row]:
    """The rows of a file or folder; at the end it is certain that they were those identified."""
    storage = sources.storages.of(document.path)
    text_key = sources.entry.text_key
    if document.format == "jsonl":
        with storage.open(document.path) as file:
            hashing = HashedFile(file, document.size_bytes, _reading(advance))
            yield from jsonl_rows(io.BufferedReader(hashing, PIECE_BYTES), document.path, text_key)
            hashing.read_rest()
        if hashing.digest != document.digest:
            raise DocumentChangedError(document.path)
        return
    done = count_fractions(document.size_bytes, _reading(advance))
    if document.format == "parquet":
        with storage.open(document.path, seek=True) as file:
            yield from parquet_rows(file, document.path, text_key, done)
    else:
        yield from hf_rows(document.path, sources.entry.storage_options, text_key, done)
    _check_unchanged(sources, document)


def _check_unchanged(sources: Sources, document: Document) -> None:
    """Raises DocumentChangedError unless the files are still those that were identified."""
    index = {}
    for path, stamp in zip(
        document.source.members or (document.path,), document.stamps, strict=True
    ):
        now, trusted = sources.storages.of(path).stamp(path)
        if now != stamp:
            raise DocumentChangedError(document.path)
        if trusted:
            index[path] = Known(stamp, "", 0)
    if len(index) == len(document.stamps):
        return
    file = document.source
    entries = [
        _identify_file(sources, file, path, None, _unnoticed, recheck=True)
        for path in file.members or (file.path,)
    ]
    again = _document(file, [entry for entry, _ in entries])
    if again is None or again.digest != document.digest:
        raise DocumentChangedError(document.path)


def _reading(advance: Advance) -> Count:
    return lambda size_bytes: advance(size_bytes, True)


def _unnoticed(size_bytes: int, was_read: bool) -> None:
    """Counted already."""
