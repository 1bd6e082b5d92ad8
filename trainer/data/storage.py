"""Files wherever they are: local paths and the URLs of any fsspec file system, alike.

Every failure of a remote library comes out as an OSError with one line of text, so that readers
need to know only one kind. Values of ``storage_options`` such as ``$NAME`` are taken from the
environment, so that secrets need not be written into configs.
"""

import contextlib
import datetime
import glob
import io
import os
import re
import time
from collections.abc import Callable, Container, Iterator, Mapping
from typing import IO, Any, Protocol, TypeVar

from everstep.checkpoint.store_fsspec import how_to_install
from everstep.trainer.data.stamps import FileStamp
from everstep.trainer.errors import DataError

StampFacts = list[Any]
"""JSON-able facts that a file system tells about a file; equal facts, equal bytes."""

REMOTE_YOUNG_S = 60.0
"""Seconds during which a remote file is not trusted by its time alone: its clock is another."""

_BUFFER_BYTES = 2**20
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")
_VERSIONS = (
    "ETag",
    "etag",
    "e_tag",
    "Content-MD5",
    "Digest",
    "md5Hash",
    "content_hash",
    "crc32c",
    "checksum",
    "generation",
    "VersionId",
    "version_id",
    "version",
    "sha256",
    "uid",
)
_TIMES = (
    "mtime",
    "LastModified",
    "last_modified",
    "Last-Modified",
    "modified",
    "updated",
    "created",
    "timeModified",
    "modification_time",
)
_ONLY_FORWARD = ("http", "https", ("http", "https"))

T = TypeVar("T")


class Storage(Protocol):
    """What reading data needs of a file system; every method raises OSError."""

    def kind(self, path: str) -> str | None:
        """'file', 'folder', or None if there is nothing, or nothing that can be read."""
        ...

    def walk(self, folder: str) -> Iterator[str]:
        """Files below a folder, without hidden ones, in any order."""
        ...

    def glob(self, pattern: str) -> Iterator[str]:
        """Files that match; ``**`` crosses folders."""
        ...

    def join(self, folder: str, name: str) -> str:
        """The path of ``name`` in ``folder``."""
        ...

    def size_bytes(self, path: str) -> int | None:
        """Size of a file, None if it is not known before it is read."""
        ...

    def stamp(self, path: str) -> tuple[StampFacts, bool]:
        """Facts about a file, and whether equal facts later will mean equal bytes."""
        ...

    def can_seek(self) -> bool:
        """Whether any file can be read from its middle."""
        ...

    def open(self, path: str, seek: bool = False) -> IO[bytes]:
        """The file, for reading from its start; with ``seek``, in any order."""
        ...


def is_url(path: str) -> bool:
    """Whether a path is for fsspec: ``scheme://...``, chained with ``::`` or not."""
    return _URL.match(path) is not None and not path.startswith(("file://", "local://"))


def storage_of(path: str, options: Mapping[str, Any]) -> Storage:
    """The file system of a path or URL. Raises DataError: unknown scheme, missing package."""
    return RemoteStorage(path, options) if is_url(path) else LocalStorage()


class Storages:
    """The file systems of one source, each opened once."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options
        self._known: dict[str, Storage] = {}

    def of(self, path: str) -> Storage:
        """The file system of a path or URL; raises DataError."""
        scheme, separator, _ = path.partition("://")
        chain = path.partition("::")[2]
        # The host is part of what some file systems are opened for (sftp, hdfs, webdav).
        host = path[len(scheme) + 3 :].partition("/")[0] if is_url(path) else ""
        key = f"{scheme}{separator}{host}::{chain}" if is_url(path) else ""
        if key not in self._known:
            self._known[key] = storage_of(path, self.options)
        return self._known[key]


def local_path(path: str) -> str:
    """A path without ``file://``, with ``~`` expanded."""
    for scheme in ("file://", "local://"):
        path = path.removeprefix(scheme)
    return os.path.expanduser(path)


class LocalStorage:
    """Files of this host, by path."""

    def kind(self, path: str) -> str | None:
        if os.path.isdir(path):
            return "folder"
        return "file" if os.path.exists(path) else None

    def walk(self, folder: str, left_out: Container[str] = ()) -> Iterator[str]:
        """As in ``Storage``, and without folders named in ``left_out``."""

        def refuse(error: OSError) -> None:
            raise error

        for above, folders, names in os.walk(folder, onerror=refuse):
            folders[:] = [f for f in folders if f not in left_out and not f.startswith(".")]
            for name in names:
                path = os.path.join(above, name)
                if not name.startswith(".") and os.path.isfile(path):
                    yield path

    def glob(self, pattern: str) -> Iterator[str]:
        return filter(os.path.isfile, glob.iglob(pattern, recursive=True))

    def join(self, folder: str, name: str) -> str:
        return os.path.join(folder, name)

    def size_bytes(self, path: str) -> int | None:
        return os.stat(path).st_size

    def stamp(self, path: str) -> tuple[StampFacts, bool]:
        now_ns = time.time_ns()
        stamp = FileStamp.of(path)
        return stamp.facts(), stamp.settled(now_ns)

    def can_seek(self) -> bool:
        return True

    def open(self, path: str, seek: bool = False) -> IO[bytes]:
        return open(path, "rb")


class RemoteStorage:
    """Files of one fsspec file system, by URL."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        from fsspec.core import url_to_fs

        # A chain such as zip://a.txt::s3://bucket/b.zip: the first link names the file.
        _, _, chain = url.partition("::")
        self._chain = f"::{chain}" if chain else ""
        try:
            self._fs, _ = url_to_fs(url, **resolve_options(options))
        except ImportError as error:
            raise DataError(
                f"data.source: reading {url!r} needs another package ({_one_line(error)}): "
                f"{how_to_install(url)}"
            ) from error
        except Exception as error:  # whatever the file system's library raises
            raise DataError(
                f"data.source: cannot reach {url!r}: {_one_line(error)}; check the URL and "
                "storage_options"
            ) from error
        self._fs.invalidate_cache()

    def kind(self, path: str) -> str | None:
        try:
            info = self._info(path)
        except FileNotFoundError as error:
            cause = error.__cause__  # over http, every failure is a file that is not found
            refused = getattr(cause, "status", 404) not in (404, 410)
            if refused or (isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)):
                raise OSError(5, _one_line(cause or error)) from error
            return None
        return "folder" if info.get("type") == "directory" else "file"

    def walk(self, folder: str) -> Iterator[str]:
        top = self._inner(folder).rstrip("/")
        for path in self._do(lambda: self._fs.find(top)):
            below = path[len(top) :].lstrip("/") if path.startswith(top) else path
            if not any(part.startswith(".") for part in below.split("/")):
                yield self._outer(path)

    def glob(self, pattern: str) -> Iterator[str]:
        inner = self._inner(pattern)
        found = self._do(lambda: self._fs.glob(inner, detail=True))
        return (self._outer(p) for p, info in found.items() if info.get("type") != "directory")

    def join(self, folder: str, name: str) -> str:
        head, separator, chain = folder.partition("::")
        return f"{head.rstrip('/')}/{name}{separator}{chain}"

    def size_bytes(self, path: str) -> int | None:
        size = self._info(path).get("size")
        return size if isinstance(size, int) else None

    def stamp(self, path: str) -> tuple[StampFacts, bool]:
        info = self._info(path)
        versions = {name: str(info[name]) for name in _VERSIONS if info.get(name) is not None}
        times = {name: info[name] for name in _TIMES if info.get(name) is not None}
        facts = [info.get("size"), versions, {name: str(t) for name, t in times.items()}]
        old = [t for t in map(_unix_s, times.values()) if t is not None]
        trusted = bool(versions) or (bool(old) and max(old) < time.time() - REMOTE_YOUNG_S)
        return facts, trusted

    def can_seek(self) -> bool:
        # Servers of https and archives read from the start to get to the middle, if at all.
        return self._fs.protocol not in _ONLY_FORWARD and not self._chain

    def open(self, path: str, seek: bool = False) -> IO[bytes]:
        # Many servers of https ignore requests for ranges: read those as one stream where it does.
        options = {"block_size": 0} if not seek and self._fs.protocol in _ONLY_FORWARD else {}
        file = self._do(lambda: self._fs.open(self._inner(path), "rb", **options))
        return io.BufferedReader(_RemoteFile(path, file), _BUFFER_BYTES)

    def _info(self, path: str) -> dict[str, Any]:
        inner = self._inner(path)

        def ask() -> dict[str, Any]:
            self._fs.invalidate_cache(self._fs._parent(inner))
            info: dict[str, Any] = self._fs.info(inner)
            return info

        return self._do(ask)

    def _inner(self, url: str) -> str:
        return str(self._fs._strip_protocol(url.partition("::")[0]))

    def _outer(self, path: str) -> str:
        return f"{self._fs.unstrip_protocol(path)}{self._chain}"

    def _do(self, action: Callable[[], T]) -> T:
        with _as_os_error():
            return action()


class _RemoteFile(io.RawIOBase):
    """A file of fsspec whose failures are OSErrors."""

    def __init__(self, path: str, file: Any) -> None:
        self.name = path
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def readinto(self, buffer: Any) -> int:
        with _as_os_error():
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        with _as_os_error():
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        with _as_os_error():
            return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever the file system's library raises
        raise OSError(getattr(error, "errno", None) or 5, _one_line(error)) from error


def _one_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())


def _unix_s(value: Any) -> float | None:
    """Seconds since 1970 of a time as file systems give it; None where that cannot be told."""
    if isinstance(value, datetime.datetime):
        aware = value if value.tzinfo else value.replace(tzinfo=datetime.UTC)
        return aware.timestamp()
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return _unix_s(datetime.datetime.fromisoformat(value))
        from email.utils import parsedate_to_datetime

        with contextlib.suppress(ValueError, TypeError):
            return _unix_s(parsedate_to_datetime(value))
        return None
    return float(value) if isinstance(value, int | float) else None


def resolve_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with '$NAME' and '${NAME}' replaced; raises DataError for what is not set."""

    def value_of(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: value_of(f"{key}.{name}", below) for name, below in value.items()}
        found = re.fullmatch(r"\$(?:\{(\w+)\}|(\w+))", value) if isinstance(value, str) else None
        if found is None:
            return value
        name = found[1] or found[2]
        if name not in os.environ:
            raise DataError(
                f"data.source: {key}={value} names the environment variable {name}, which is not "
                "set; export it, or write the value itself"
            )
        return os.environ[name]

    return {name: value_of(f"storage_options.{name}", value) for name, value in options.items()}
