"""A folder as a store: O_DIRECT writing, links that never replace, directory syncs."""

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from everstep.checkpoint.direct_io import (
    StreamWriter,
    make_directory,
    publish,
    sync_directory,
)
from everstep.checkpoint.store import check_key

TEMPORARY_SUFFIX = ".tmp"
"""Of names that a killed ``put`` may leave behind; never listed."""


class LocalStore:
    """A folder of this host or of a shared file system, made when first written to; see ``Store``.

    Folders are made where they are missing; the names in them are durable once ``settle`` was
    called for them, or after a ``put`` that settles (for its own folder).
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def describe(self, key: str = "") -> str:
        return str(self.local_path(key))

    def local_path(self, key: str = "") -> Path:
        return self.root / check_key(key, root=True)

    def list(self, folder: str = "") -> list[str]:
        try:
            names = os.listdir(self.local_path(folder))
        except FileNotFoundError:
            return []
        return sorted(name for name in names if not name.endswith(TEMPORARY_SUFFIX))

    def size(self, key: str) -> int | None:
        try:
            return os.stat(self.root / check_key(key)).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        with (self.root / check_key(key)).open("rb") as file:
            left = max(0, os.fstat(file.fileno()).st_size - offset)
            file.seek(offset)
            return file.read(left if length is None else min(left, length))

    def put(self, key: str, data: bytes, *, settle: bool = True) -> None:
        path = self.root / check_key(key)
        if settle:
            make_directory(path.parent)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}{TEMPORARY_SUFFIX}")
        publish(path, data, temporary, settle=settle)

    def writer(self, key: str, size_bytes: int) -> StreamWriter:
        path = self.root / check_key(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        return StreamWriter(path)

    def settle(self, folders: Iterable[str]) -> None:
        for folder in folders:
            sync_directory(self.local_path(folder))

    def delete(self, key: str) -> None:
        path = self.root / check_key(key)
        with contextlib.suppress(FileNotFoundError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def clear_temporaries(self, folder: str) -> None:
        """Remove what killed ``put`` calls left in a folder; for the only writer of the store."""
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.local_path(folder)):
                if name.endswith(TEMPORARY_SUFFIX):
                    (self.local_path(folder) / name).unlink(missing_ok=True)
