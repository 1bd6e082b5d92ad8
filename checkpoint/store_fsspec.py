"""Any fsspec URL as a store: S3 and its like, memory, others.

Large objects go up as one stream in parts (multipart on S3), written by a thread of their own while
the next part is filled; they are invisible until ``finish``. Small ones are created with a
conditional request, so that of two writers one loses. Everything that a file system's library
raises comes out as an OSError with one line of text.
"""

import contextlib
import inspect
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.errors import CheckpointError
from everstep.checkpoint.store import check_key

PART_BYTES = 16 * 2**20
MAX_PARTS = 9_000
"""S3 takes 10,000 parts; a large pack gets larger parts."""
_EXCLUSIVE_OPEN = {"s3", "s3a", "memory"}
"""File systems whose ``open(…, "xb")`` is known to create, never to replace."""
_EXTRAS = {"s3": "s3", "s3a": "s3"}
"""Scheme -> the extra of ours that brings its file system."""
_CREATING = threading.Lock()
"""For stores that look first and create then: file systems in this process's memory, and those
that are promised a single writer."""


class FsspecStore:
    """Objects below a URL; see ``Store``.

    Args:
        url: where the checkpoints are.
        storage_options: for fsspec: credentials, endpoint, ….
        single_writer: promises that at most one job at a time writes here. Without it, a file
            system that cannot create an object on condition that there is none is refused: two jobs
            could mix.

    Raises:
        CheckpointError: the URL's scheme is unknown, needs a package that is missing, or cannot be
            written to safely.
    """

    def __init__(
        self,
        url: str,
        storage_options: Mapping[str, Any] | None = None,
        *,
        single_writer: bool = False,
    ) -> None:
        from fsspec.core import url_to_fs

        options = {"use_listings_cache": False, **(storage_options or {})}
        try:
            fs, root = url_to_fs(url, **options)
        except ImportError as e:
            raise CheckpointError(
                f"checkpoints in {url!r} need another package ({_one_line(e)}): "
                f"{how_to_install(url)}"
            ) from e
        except Exception as e:  # whatever the file system's library raises
            raise CheckpointError(
                f"{url!r} cannot be reached: {_one_line(e)}; check the URL and its options"
            ) from e
        self._fs, self._root, self._url = fs, str(root).rstrip("/"), url.rstrip("/")
        self._single_writer = single_writer
        self._looks_first = single_writer or "memory" in _protocols(fs)
        if not single_writer and not _creates_only(fs):
            raise CheckpointError(
                f"checkpoints in {url!r}: this kind of store cannot create an object on condition "
                "that there is none, so that two jobs could mix: pass single_writer=True if never "
                "more than one job at a time writes there, or use S3 or a shared folder"
            )

    def describe(self, key: str = "") -> str:
        return f"{self._url}/{key}" if check_key(key, root=True) else self._url

    def local_path(self, key: str = "") -> Path | None:
        return None

    def list(self, folder: str = "") -> list[str]:
        path = self._path(folder)
        with _as_os_error(self.describe(folder)):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(path, detail=False)
            except FileNotFoundError:
                return []
        below = (str(name).rstrip("/").removeprefix(f"{path}/") for name in found)
        return sorted({name for name in below if name and "/" not in name})

    def size(self, key: str) -> int | None:
        path = self._path(check_key(key))
        with _as_os_error(self.describe(key)):
            self._fs.invalidate_cache()
            try:
                info = self._fs.info(path)
            except FileNotFoundError:
                return None
        return int(info["size"]) if info.get("type") == "file" else None

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        path = self._path(check_key(key))
        if length == 0:
            return b""
        end = None if length is None else offset + length
        with _as_os_error(self.describe(key)):
            try:
                data = self._fs.cat_file(path, start=offset, end=end)
            except FileNotFoundError:
                raise
            except Exception:  # S3 refuses a range that begins at the end or after it
                if (self.size(key) or 0) > offset:
                    raise
                data = b""
        return bytes(data)

    def put(self, key: str, data: bytes, *, settle: bool = True) -> None:
        path = self._path(check_key(key))
        alone = _CREATING if self._looks_first else contextlib.nullcontext()
        with alone, _as_os_error(self.describe(key)):
            if not self._single_writer:
                self._fs.pipe_file(path, data, mode="create")
            elif self.size(key) is not None:
                raise FileExistsError(17, "Object exists", self.describe(key))
            else:
                self._fs.pipe_file(path, data)

    def writer(self, key: str, size_bytes: int) -> "FsspecWriter":
        path = self._path(check_key(key))
        if self.size(key) is not None:
            raise FileExistsError(17, "Object exists", self.describe(key))
        exclusive = not _EXCLUSIVE_OPEN.isdisjoint(_protocols(self._fs))
        part_bytes = max(PART_BYTES, -(-size_bytes // MAX_PARTS))
        mode = "xb" if exclusive else "wb"
        return FsspecWriter(self._fs, path, self.describe(key), mode, part_bytes)

    def settle(self, folders: Iterable[str]) -> None:
        for folder in folders:
            check_key(folder, root=True)  # what is listed is durable

    def delete(self, key: str) -> None:
        path = self._path(check_key(key))
        with _as_os_error(self.describe(key)), contextlib.suppress(FileNotFoundError):
            self._fs.invalidate_cache()
            self._fs.rm(path, recursive=True)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if check_key(key, root=True) else self._root


class FsspecWriter:
    """See ``StoreWriter``; two staging buffers, one being filled while the other goes out."""

    def __init__(self, fs: Any, path: str, name: str, mode: str, part_bytes: int) -> None:
        self._fs, self._path, self._name = fs, path, name
        with _as_os_error(name):
            self._file = fs.open(path, mode, block_size=part_bytes)
        self._buffers: list[ByteArray] = [np.empty(PART_BYTES, np.uint8) for _ in range(2)]
        self._filled = 0
        self._size = 0
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="everstep-upload")
        self._sending: Future[None] | None = None
        self._finished = False

    def space(self) -> ByteArray:
        return self._buffers[0][self._filled :]

    def advance(self, count: int) -> None:
        self._filled += count
        if self._filled == len(self._buffers[0]):
            self._send()

    def append(self, data: bytes | ByteArray) -> None:
        view = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
        while len(view):
            n = min(len(view), len(self.space()))
            self.space()[:n] = view[:n]
            self.advance(n)
            view = view[n:]

    def finish(self) -> int:
        self._send()
        self._wait()
        self._finished = True  # from here on the object may be there, and then it is whole
        with _as_os_error(self._name):
            self._file.close()
        return self._size

    def _send(self) -> None:
        self._wait()
        data = self._buffers[0][: self._filled]
        self._size += len(data)
        self._filled = 0
        self._buffers.reverse()
        self._sending = self._sender.submit(self._write, data)

    def _write(self, data: ByteArray) -> None:
        with _as_os_error(self._name):
            self._file.write(data.data)

    def _wait(self) -> None:
        sending, self._sending = self._sending, None
        if sending is not None:
            sending.result()

    def __enter__(self) -> "FsspecWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._sender.shutdown(wait=True, cancel_futures=True)
        if not self._finished:
            self._discard()

    def _discard(self) -> None:
        """Forget what was sent; a file of fsspec would publish it when it is collected."""
        with contextlib.suppress(Exception):
            if hasattr(self._file, "discard"):
                self._file.discard()
        with contextlib.suppress(AttributeError):
            self._file.closed = True
        with contextlib.suppress(Exception):
            self._fs.rm_file(self._path)  # where a file is visible from its first byte on


def how_to_install(url: str) -> str:
    """What brings the package that a URL's file system is in."""
    extra = _EXTRAS.get(url.rpartition("::")[2].partition("://")[0])
    return f"pip install 'everstep[{extra}]'" if extra else "install it with pip"


def _protocols(fs: Any) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def _creates_only(fs: Any) -> bool:
    """Whether ``pipe_file(mode="create")`` is more than fsspec's own look and then write."""
    if "memory" in _protocols(fs):
        return True
    own = getattr(type(fs), "_pipe_file", None)
    return own is not None and "mode" in inspect.signature(own).parameters


@contextlib.contextmanager
def _as_os_error(name: str) -> Iterator[None]:
    try:
        yield
    except FileExistsError as e:
        raise FileExistsError(17, "Object exists", name) from e
    except FileNotFoundError as e:
        raise FileNotFoundError(2, "No such object", name) from e
    except Exception as e:  # whatever the file system's library raises
        number = e.errno if isinstance(e, OSError) else None
        raise OSError(number if isinstance(number, int) else 5, _one_line(e), name) from e


def _one_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
