"""The reference store: a dictionary, for tests and as the shortest statement of the contract."""

import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import numpy as np

from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.store import check_key


class MemoryStore:
    """A store that ends with its process; see ``Store``. Threads may share it."""

    def __init__(self, name: str = "memory") -> None:
        self._name = name
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def describe(self, key: str = "") -> str:
        return f"{self._name}:{check_key(key, root=True)}"

    def local_path(self, key: str = "") -> Path | None:
        return None

    def list(self, folder: str = "") -> list[str]:
        prefix = f"{check_key(folder)}/" if folder else ""
        with self._lock:
            below = [k.removeprefix(prefix) for k in self._objects if k.startswith(prefix)]
        return sorted({name.partition("/")[0] for name in below})

    def size(self, key: str) -> int | None:
        data = self._objects.get(check_key(key))
        return None if data is None else len(data)

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        data = self._objects.get(check_key(key))
        if data is None:
            raise FileNotFoundError(2, "No such object", self.describe(key))
        return data[offset : None if length is None else offset + length]

    def put(self, key: str, data: bytes, *, settle: bool = True) -> None:
        with self._lock:
            if check_key(key) in self._objects:
                raise FileExistsError(17, "Object exists", self.describe(key))
            self._objects[key] = bytes(data)

    def writer(self, key: str, size_bytes: int) -> "MemoryWriter":
        return MemoryWriter(self, check_key(key))

    def settle(self, folders: Iterable[str]) -> None:
        for folder in folders:
            check_key(folder, root=True)

    def delete(self, key: str) -> None:
        check_key(key)
        with self._lock:
            gone = [k for k in self._objects if k == key or k.startswith(f"{key}/")]
            for name in gone:
                del self._objects[name]


class MemoryWriter:
    """See ``StoreWriter``."""

    def __init__(self, store: MemoryStore, key: str) -> None:
        self._store, self._key = store, key
        self._done = bytearray()
        self._staging: ByteArray = np.zeros(2**16, np.uint8)

    def space(self) -> ByteArray:
        return self._staging

    def advance(self, count: int) -> None:
        self._done += self._staging[:count].tobytes()

    def append(self, data: bytes | ByteArray) -> None:
        self._done += bytes(data)

    def finish(self) -> int:
        self._store.put(self._key, bytes(self._done))
        return len(self._done)

    def __enter__(self) -> "MemoryWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.clear()
