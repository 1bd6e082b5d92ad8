"""What lets us trust work done on a file before: its stamp, and small records that cannot lie.

Hashing all text at every start would read terabytes for nothing; trusting size and modification
time alone misses edits that keep both. The rule here is the one of git's index: size, modification
time, *change* time and inode must all be what they were (no program can set the change time back),
and a file that was still young when it was read is not trusted at all, because a later write could
fall into the same clock tick.
"""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

YOUNG_NS = 2_000_000_000
"""Nanoseconds during which a changed file is not trusted: the coarsest file system clock (FAT)."""


@dataclass(frozen=True)
class FileStamp:
    """Everything the file system tells about whether a file's bytes are still the same."""

    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: str | Path) -> "FileStamp":
        """The stamp of an existing file; raises OSError."""
        status = os.stat(path)
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)

    def facts(self) -> list[Any]:
        """The stamp as JSON has it."""
        return [self.size_bytes, self.mtime_ns, self.ctime_ns, self.inode]

    def settled(self, now_ns: int) -> bool:
        """Whether a write after ``now_ns`` (Unix time) is certain to change this stamp."""
        return max(self.mtime_ns, self.ctime_ns) < now_ns - YOUNG_NS


@contextlib.contextmanager
def replacing(path: Path, tag: str = "record") -> Iterator[IO[bytes]]:
    """A new file that takes the place of ``path`` at the end, durable and at once, or not at all.

    Until then its name is ``PATH.TAG.RANDOM.tmp``; only a killed process leaves such a file.
    """
    temporary = path.with_name(f"{path.name}.{tag}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise


def seal(value: Any) -> bytes:
    """JSON-able ``value`` as two lines: a checksum, and the JSON that it is of."""
    body = json.dumps(value, separators=(",", ":")).encode()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body + b"\n"


def unseal(sealed: bytes) -> Any:
    """What ``seal`` was given, or None if anything is damaged; ignores what follows the lines."""
    checksum, _, rest = sealed.partition(b"\n")
    body = rest.partition(b"\n")[0]
    return json.loads(body) if hashlib.sha256(body).hexdigest().encode() == checksum else None


def write_record(path: Path, value: Any) -> None:
    """Stores JSON-able ``value`` with its checksum; failure is ignored: records only save time."""
    with contextlib.suppress(OSError), replacing(path) as file:
        file.write(seal(value))


def read_record(path: Path) -> Any:
    """What ``write_record`` stored, or None if it is missing or damaged in any way."""
    try:
        return unseal(path.read_bytes())
    except OSError:
        return None
