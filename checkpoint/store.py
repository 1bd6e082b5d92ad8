"""What a checkpoint needs of the place where it lives: a few operations on named bytes.

Implementations: local folders in ``store_local.py``, any fsspec URL in ``store_fsspec.py``, and a
reference in memory in ``store_memory.py``; ``tests/contracts/test_store.py`` holds for all of them.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Protocol, runtime_checkable

from everstep.checkpoint.direct_io import ByteArray

_SEGMENT = re.compile(r"[A-Za-z0-9._-]{1,255}")


class StoreWriter(Protocol):
    """A new object that is written front to back; a context manager.

    Fill ``space()`` and call ``advance(n)``, until ``finish()``. Nobody sees it before
    that; leaving the context without ``finish()`` leaves nothing behind.
    """

    def space(self) -> ByteArray:
        """The unfilled part of the staging buffer; never empty."""
        ...

    def advance(self, count: int) -> None:
        """Take over the first ``count`` bytes of ``space()``."""
        ...

    def append(self, data: bytes | ByteArray) -> None:
        """Copy bytes in; for the small parts of an object."""
        ...

    def finish(self) -> int:
        """Make the object durable; returns its size in bytes."""
        ...

    def __enter__(self) -> "StoreWriter": ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


@runtime_checkable
class Store(Protocol):
    """Objects under keys such as ``step-00000012-g00001/manifest.json``.

    Keys are relative, of plain segments, never with ``..``: all methods raise ValueError for others
    (see ``check_key``). Failures are OSErrors with one line of text; an object that is not there is
    a FileNotFoundError. No object is ever replaced.
    """

    def describe(self, key: str = "") -> str:
        """The path or URL of an object, for people and messages; ``""`` is the whole store."""
        ...

    def local_path(self, key: str = "") -> Path | None:
        """Where an object is as a file of this host, to be mapped and locked; None: it is not."""
        ...

    def list(self, folder: str = "") -> list[str]:
        """Names directly below a folder, sorted; none where there is no such folder."""
        ...

    def size(self, key: str) -> int | None:
        """Size of an object in bytes; None where there is none."""
        ...

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes of an object from an offset on (None: to its end); fewer where it ends before."""
        ...

    def put(self, key: str, data: bytes, *, settle: bool = True) -> None:
        """Create a small object, whole or not at all, its bytes durable.

        Args:
            key: where.
            data: all of it.
            settle: False: its name need not be durable yet, ``settle`` does that for many at once.

        Raises:
            FileExistsError: there is one already; of several callers at once exactly one succeeds.
        """
        ...

    def writer(self, key: str, size_bytes: int) -> StoreWriter:
        """Begin a large object; raises FileExistsError, at ``finish`` at the latest."""
        ...

    def settle(self, folders: Iterable[str]) -> None:
        """Make the names in these folders durable, where a store does not do so by itself."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object, or everything below a folder; nothing there is success."""
        ...


class PackFolder(Protocol):
    """Where the packs of one checkpoint are: a ``Folder``, or the memory of a snapshot."""

    @property
    def where(self) -> str:
        """The path or URL of all of it, for people and messages."""
        ...

    @property
    def path(self) -> Path | None:
        """The local folder with the packs as files; None: there is none."""
        ...

    def describe(self, name: str) -> str:
        """The path or URL of a pack, for people and messages."""
        ...

    def size(self, name: str) -> int | None:
        """Size of a pack in bytes; None where there is none."""
        ...

    def read(self, name: str, offset: int, length: int) -> bytes | ByteArray:
        """Bytes of a pack; fewer where it ends before, FileNotFoundError where there is none."""
        ...


class Folder:
    """A folder of a store, for reading."""

    def __init__(self, store: Store, folder: str) -> None:
        self.store, self.folder = store, check_key(folder)

    @property
    def where(self) -> str:
        """The path or URL of the folder."""
        return self.store.describe(self.folder)

    @property
    def path(self) -> Path | None:
        """The folder as one of this host; None: it is not."""
        return self.store.local_path(self.folder)

    def describe(self, name: str) -> str:
        """The path or URL of an object of the folder."""
        return self.store.describe(self._key(name))

    def local_path(self, name: str) -> Path | None:
        """See ``Store.local_path``."""
        return self.store.local_path(self._key(name))

    def size(self, name: str) -> int | None:
        """See ``Store.size``."""
        return self.store.size(self._key(name))

    def read(self, name: str, offset: int, length: int) -> bytes:
        """See ``Store.read``."""
        return self.store.read(self._key(name), offset, length)

    def _key(self, name: str) -> str:
        return f"{self.folder}/{name}"


def check_key(key: str, *, root: bool = False) -> str:
    """The key itself, when no part of it can leave the store.

    Args:
        key: what to check.
        root: whether ``""``, the whole store, is meant sometimes.

    Raises:
        ValueError: it is absolute, empty, or has odd segments.
    """
    segments = key.split("/")
    good = all(_SEGMENT.fullmatch(s) and s not in (".", "..") for s in segments)
    if not good and not (root and not key):
        raise ValueError(
            f"key {key!r}: expected relative segments of letters, digits, '.', '_' and '-'"
        )
    return key
