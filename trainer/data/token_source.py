"""A source that holds tokens already: folders of ``everstep data tokenize``, .npy, raw .bin.

Local files are mapped where they are; remote ones are fetched into the cache once. Everything is
checked against its checksum when it is first seen, and again unless its stamp says that it is the
same file still. Files without an index have no checksum to compare: theirs is what is found.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from everstep.trainer.data.cache_lock import working_alone
from everstep.trainer.data.fetch import fetched_file, fetched_folder
from everstep.trainer.data.problems import unreadable
from everstep.trainer.data.progress_meter import Meter
from everstep.trainer.data.sources import SourceFile, Sources
from everstep.trainer.data.stamps import read_record, write_record
from everstep.trainer.data.storage import LocalStorage, is_url
from everstep.trainer.data.token_folder import (
    TokenFolder,
    map_tokens,
    open_shards,
    read_folder,
    sha256_of_file,
    tokenizer_of,
)
from everstep.trainer.data.token_row import TokenArray, TokenRow
from everstep.trainer.data.tokenizer import Tokenizer
from everstep.trainer.errors import DataError

_CHUNK_TOKENS = 2**22
_THREADS = 8
_LOCAL = LocalStorage()


@dataclass(frozen=True)
class TokenSource:
    """Tokens as they were found."""

    tokens: TokenRow
    digest: str
    """Hex digest of all tokens, in order."""
    documents: int | None
    """None where nothing tells."""
    text_bytes: int
    bad_rows: int
    tokenizer: Tokenizer | None
    """Of the folders; None if there is none, only files that do not say."""
    tokenizer_at: str
    """Where it was found."""
    largest_id: int
    """Of the files that do not say their tokenizer; -1 if there are none."""


@dataclass(frozen=True)
class _Part:
    tokens: list[TokenArray]
    digest: str
    index: TokenFolder | None
    largest_id: int
    folder: Path


def open_token_source(sources: Sources, cache: Path, build: bool, meter: Meter) -> TokenSource:
    """Opens all tokens of a source, one file after the other, sorted by path.

    With ``build``, remote files are asked whether they have changed, fetched, and checked; else
    they must be in the cache.

    Raises:
        DataError: something is missing, damaged, no token file, or of another tokenizer.
    """
    checker = _Checker(cache / f"tokens-checked-{sources.tag}", meter)

    def open_all() -> list[_Part]:
        return [_open_file(sources, file, cache, build, meter, checker) for file in files]

    files = sources.files
    if build and any(is_url(file.path) for file in files):
        with working_alone(cache, sources.tag):
            parts = open_all()
    else:
        parts = open_all()
    checker.remember()
    tokenizer, at = None, ""
    for part in parts:
        if part.index is None:
            continue
        if tokenizer is None:
            tokenizer, at = tokenizer_of(part.folder, part.index), str(part.folder)
        elif tokenizer.digest != part.index.tokenizer.digest:
            raise DataError(
                f"data.source: '{at}' and '{part.folder}' were made with different tokenizers; "
                "make them again with the same one"
            )
    indexes = [part.index for part in parts if part.index is not None]
    digests = [part.digest for part in parts]
    return TokenSource(
        tokens=TokenRow([array for part in parts for array in part.tokens]),
        digest=hashlib.sha256(json.dumps(digests).encode()).hexdigest(),
        documents=sum(i.documents for i in indexes) if len(indexes) == len(parts) else None,
        text_bytes=sum(index.text_bytes for index in indexes),
        bad_rows=sum(index.bad_rows for index in indexes),
        tokenizer=tokenizer,
        tokenizer_at=at,
        largest_id=max((part.largest_id for part in parts), default=-1),
    )


def verify_shards(folder: Path, index: TokenFolder, advance: Callable[[int], None]) -> None:
    """Reads every shard. Raises DataError for one whose checksum is not that of the index."""
    paths = [folder / shard.file for shard in index.shards]
    digests = _hash_files(paths, advance)
    for path, digest, shard in zip(paths, digests, index.shards, strict=True):
        if digest != shard.sha256:
            raise _damaged(path)


def _open_file(
    sources: Sources,
    file: SourceFile,
    cache: Path,
    build: bool,
    meter: Meter,
    checker: "_Checker",
) -> _Part:
    if file.format == "tokens":
        folder = Path(file.path)
        if is_url(file.path):
            folder = fetched_folder(sources.storages, file.path, cache, sources.tag, build, meter)
        return _open_folder(folder, checker)
    path = Path(file.path)
    if is_url(file.path):
        path = fetched_file(sources.storages, file.path, cache, sources.tag, build, meter)
    if file.format == "npy":
        array = _map_npy(path, file.path)
    else:
        array = _map_bin(path, file.path, sources.entry.token_dtype)
    sha256, largest_id = checker.facts_of(path, array)
    digest = f"{array.dtype.str} {array.size} {sha256}"
    return _Part([array], digest, None, largest_id, path.parent)


def _open_folder(folder: Path, checker: "_Checker") -> _Part:
    index = read_folder(folder)
    checker.check([folder / shard.file for shard in index.shards], [s.sha256 for s in index.shards])
    return _Part(open_shards(folder, index), index.digest, index, -1, folder)


def _map_npy(path: Path, name: str) -> TokenArray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(
            f"data.source: '{name}' is not an array that numpy can map "
            f"({' '.join(str(error).split())}); save it with numpy.save"
        ) from error
    if array.ndim != 1 or array.dtype.kind != "u":
        raise DataError(
            f"data.source: '{name}' holds {array.dtype} of shape {array.shape}, expected unsigned "
            "integers in one dim; save it as such, for example as uint16"
        )
    return np.asarray(array)


def _map_bin(path: Path, name: str, token_dtype: str | None) -> TokenArray:
    if token_dtype is None:
        raise DataError(
            f"data.source: '{name}' does not tell the type of its tokens; write "
            f"{{path: {name}, token_dtype: uint16}}, or uint32"
        )
    dtype = np.dtype(token_dtype).newbyteorder("<")
    try:
        size_bytes = path.stat().st_size
        if size_bytes % dtype.itemsize:
            raise DataError(
                f"data.source: '{name}' has {size_bytes:,} bytes, which is no whole number of "
                f"{token_dtype} tokens; correct token_dtype, or copy the file again"
            )
        return map_tokens(path, dtype, size_bytes // dtype.itemsize)
    except OSError as error:
        raise unreadable(name, error) from error


class _Checker:
    """Reads files of tokens, and remembers which were right."""

    def __init__(self, record_path: Path, meter: Meter) -> None:
        self._path = record_path
        self._meter = meter
        self._known: dict[str, Any] = read_record(record_path) or {}
        self._now: dict[str, Any] = {}

    def check(self, paths: list[Path], digests: list[str]) -> None:
        """Raises DataError for a file that has not the digest."""
        unknown = []
        stamps = [_LOCAL.stamp(str(path)) for path in paths]
        for path, sha256, (stamp, trusted) in zip(paths, digests, stamps, strict=True):
            entry = [stamp, sha256, -1]
            if self._known.get(str(path)) == entry:
                self._meter.advance(stamp[0], False)
            else:
                unknown.append((path, sha256))
            if trusted:
                self._now[str(path)] = entry
        found = _hash_files([p for p, _ in unknown], lambda n: self._meter.advance(n, True))
        for (path, sha256), digest in zip(unknown, found, strict=True):
            if digest != sha256:
                raise _damaged(path)

    def facts_of(self, path: Path, array: TokenArray) -> tuple[str, int]:
        """SHA-256 of a file, and the largest of the tokens in it."""
        stamp, trusted = _LOCAL.stamp(str(path))
        known = self._known.get(str(path))
        if known is not None and known[0] == stamp and (known[2] >= 0 or not array.size):
            self._meter.advance(stamp[0], False)
            sha256, largest = known[1:]
        else:
            (sha256,) = _hash_files([path], lambda n: self._meter.advance(n, True))
            step = _CHUNK_TOKENS
            starts = range(0, array.size, step)
            largest = max((int(array[start : start + step].max()) for start in starts), default=-1)
        if trusted:
            self._now[str(path)] = [stamp, sha256, largest]
        return str(sha256), int(largest)

    def remember(self) -> None:
        """Writes down what was right, for the next time."""
        if self._now != self._known:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_record(self._path, self._now)


def _hash_files(paths: Sequence[Path], advance: Callable[[int], None]) -> list[str]:
    """SHA-256 of each file, several at once; ``advance`` is called by this thread."""
    done_bytes = 0
    counting = threading.Lock()
    stop = threading.Event()

    def count(size_bytes: int) -> None:
        nonlocal done_bytes
        with counting:
            done_bytes += size_bytes
        if stop.is_set():
            raise CancelledError

    told = 0
    futures: list[Future[str]] = []
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        try:
            futures += [pool.submit(sha256_of_file, path, count) for path in paths]
            pending = set(futures)
            while pending:
                _, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                if (now := done_bytes) > told:
                    advance(now - told)
                    told = now
            return [_digest(path, future) for path, future in zip(paths, futures, strict=True)]
        finally:
            stop.set()
            for future in futures:
                future.cancel()


def _digest(path: Path, hashed: Future[str]) -> str:
    try:
        return hashed.result()
    except OSError as error:  # one of a read does not name the file
        raise unreadable(str(path), error) from error


def _damaged(path: Path) -> DataError:
    return DataError(
        f"the shard '{path}' is damaged: its checksum is not the one in its index; copy the folder "
        "again, or make it again with everstep data tokenize"
    )
