"""The token cache: one plain file per (text, tokenizer), named by what is in it.

A header of ``HEADER_BYTES`` (a magic line, a checksum, one line of JSON, padding of spaces), then
the tokens as little-endian unsigned integers, ready to be mapped. A file appears under its name
only when it is complete; it is read only if header, size and checksum are right. The checksum of a
file that was found right before, and that the file system says is the same still, is not computed
again.
"""

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from everstep.trainer.data.stamps import (
    FileStamp,
    read_record,
    replacing,
    seal,
    unseal,
    write_record,
)
from everstep.trainer.data.token_row import TokenArray

HEADER_BYTES = 4096
"""A page, so that mapped tokens are aligned."""

_MAGIC = b"everstep tokens 1\n"


@dataclass(frozen=True)
class TokenFileKey:
    """What decides the tokens of a whole corpus."""

    text_digest: str
    tokenizer_digest: str

    @property
    def name(self) -> str:
        """The file's name in the cache."""
        both = f"{self.text_digest} {self.tokenizer_digest}"
        return f"tokens-{hashlib.sha256(both.encode()).hexdigest()[:32]}.bin"


@dataclass(frozen=True)
class TokenFile:
    """All tokens of a corpus, mapped read-only."""

    tokens: TokenArray
    """(N,)"""
    sha256: str
    """Hex digest of the tokens' bytes."""
    facts: dict[str, Any]
    """What the writer of the file said about the text; empty in files of text alone."""


def write_token_file(
    path: Path,
    key: TokenFileKey,
    dtype: np.dtype[Any],
    arrays: Iterable[TokenArray],
    tag: str,
    facts: Callable[[], dict[str, Any]] = dict,
) -> None:
    """Writes ``arrays``, one after the other, as the tokens of ``key``.

    Args:
        path: Replaced if it exists.
        tag: Part of the temporary file's name.
        facts: Asked after the last array; JSON-able.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    on_disk = dtype.newbyteorder("<")
    hasher = hashlib.sha256()
    count = 0
    with replacing(path, tag) as file:
        file.write(bytes(HEADER_BYTES))
        for array in arrays:
            data = array.astype(on_disk, copy=False).data
            hasher.update(data)
            file.write(data)
            count += array.size
        header = {
            "dtype": on_disk.str,
            "tokens": count,
            "sha256": hasher.hexdigest(),
            "key": asdict(key),
        }
        if said := facts():
            header["facts"] = said
        file.seek(0)
        file.write((_MAGIC + seal(header)).ljust(HEADER_BYTES))


def open_token_file(path: Path, key: TokenFileKey) -> TokenFile | None:
    """Maps the tokens of ``key``; None if the file is missing or damaged in any way."""
    try:
        header = _read_header(path, key)
        if header is None or not _is_intact(path, header["sha256"]):
            return None
        dtype = np.dtype(header["dtype"])
        mapped = np.memmap(path, dtype, mode="r", offset=HEADER_BYTES, shape=(header["tokens"],))
    except OSError:
        return None
    return TokenFile(np.asarray(mapped), header["sha256"], header.get("facts", {}))


def _read_header(path: Path, key: TokenFileKey) -> dict[str, Any] | None:
    """The header, if it is whole, belongs to ``key``, and the file has the size that it says."""
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
        size_bytes = file.seek(0, 2)
    if len(head) != HEADER_BYTES or not head.startswith(_MAGIC):
        return None
    header = unseal(head[len(_MAGIC) :])
    if header is None or header["key"] != asdict(key):
        return None
    payload_bytes = header["tokens"] * np.dtype(header["dtype"]).itemsize
    return header if HEADER_BYTES + payload_bytes == size_bytes else None


def _is_intact(path: Path, sha256: str) -> bool:
    """Compares the checksum, or relies on an earlier comparison of the very same file."""
    record_path = path.with_suffix(".verified")
    now_ns = time.time_ns()
    stamp = FileStamp.of(path)
    verdict = {"stamp": asdict(stamp), "sha256": sha256}
    if read_record(record_path) == verdict:
        return True
    with path.open("rb", buffering=0) as file:
        file.seek(HEADER_BYTES)
        intact = hashlib.file_digest(file, "sha256").hexdigest() == sha256
    if intact and stamp.settled(now_ns):
        write_record(record_path, verdict)
    return intact
