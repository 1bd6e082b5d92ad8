"""From an entry of ``data.source`` to a list of files: local ones and URLs, folders and globs."""

import glob
import hashlib
import os
import platform
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from everstep.trainer.config import AUTO, DataFormat, SourceConfig
from everstep.trainer.data.storage import LocalStorage, Storage, Storages, is_url, local_path
from everstep.trainer.errors import DataError

STDLIB = "stdlib"
"""The source that is there on every machine: the sources of the Python standard library."""

TOKEN_INDEX = "everstep_tokens.json"
"""The file that makes a folder one of ``everstep data tokenize``."""

FileFormat = Literal["text", "jsonl", "parquet", "hf", "tokens", "npy", "bin"]

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_JSONL = (".jsonl", ".ndjson")
_SUFFIXES: dict[FileFormat, tuple[str, ...]] = {
    "jsonl": (*_JSONL, *(suffix + end for suffix in _JSONL for end in COMPRESSIONS)),
    "parquet": (".parquet", ".pq"),
    "npy": (".npy",),
    "bin": (".bin",),
}
_TOKEN_FORMATS = ("tokens", "npy", "bin")
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
_LOCAL = LocalStorage()


@dataclass(frozen=True)
class SourceFile:
    """One file that the corpus may read, or one folder that is read as a whole."""

    path: str
    """Absolute, with links resolved; or a URL."""
    named: bool
    """The user wrote this very name: if it cannot be read, that is an error."""
    format: FileFormat = "text"
    """'hf' and 'tokens' are folders."""
    members: tuple[str, ...] = ()
    """The files in such a folder, sorted."""


@dataclass(frozen=True)
class Sources:
    """The files of one source, each once, sorted by path."""

    name: str
    """For people: 'Python 3.11.7 standard library', or the patterns as written."""
    key: str
    """Identifies the patterns on this machine, whatever the working directory."""
    files: tuple[SourceFile, ...]
    storages: Storages = field(compare=False, repr=False)
    entry: SourceConfig = field(compare=False, repr=False)

    @property
    def is_tokens(self) -> bool:
        """Whether these files hold tokens already; never mixed with text."""
        return any(file.format in _TOKEN_FORMATS for file in self.files[:1])

    @property
    def tag(self) -> str:
        """Names what the cache keeps of this source: 16 hex digits, made of the key."""
        return hashlib.sha256(self.key.encode()).hexdigest()[:16]


def entries_of(source: str | list[str] | list[SourceConfig]) -> list[SourceConfig]:
    """The mixture that ``data.source`` is; paths alone are a mixture of one."""
    if isinstance(source, str) or not source or isinstance(source[0], str):
        return [SourceConfig.model_construct(path=source)]
    return [entry for entry in source if isinstance(entry, SourceConfig)]


def find_files(source: str | list[str] | SourceConfig, leave_out: Path | None = None) -> Sources:
    """Lists the files of one source and tells their formats.

    A name that exists is that file or folder, even with glob characters in it; ``**`` crosses
    folders. Folders are read recursively, without hidden entries and without following links to
    folders. 'stdlib' is a keyword: a folder of this name is './stdlib'. What lies below the folder
    ``leave_out`` (a run directory: its logs are no text to train on) is found only by its own name.

    Raises:
        DataError: nothing is there, a pattern or folder yields no file, or text and tokens are
            mixed.
    """
    if not isinstance(source, SourceConfig):
        source = SourceConfig.model_construct(path=source)
    patterns = [source.path] if isinstance(source.path, str) else source.path
    if not patterns:
        raise DataError(
            "data.source is an empty list: name text files, folders or globs, or use 'stdlib'"
        )
    below = None if leave_out is None else os.path.join(os.path.realpath(leave_out), "")
    storages = Storages(source.storage_options)
    found: dict[str, SourceFile] = {}
    for pattern in patterns:
        for file in _formatted(pattern, source.format, storages):
            if below is not None and file.path.startswith(below) and not file.named:
                continue
            before = found.get(file.path)
            if before is None or not before.named:
                found[file.path] = file
    name = ", ".join(_describe(pattern) for pattern in patterns)
    files = tuple(found[path] for path in sorted(found))
    _check_kinds(name, files)
    key = [_absolute(pattern) for pattern in patterns]
    key += [] if source.format == AUTO else [f"format:{source.format}"]
    return Sources(name, "\n".join(key), files, storages, source)


def format_of(path: str) -> FileFormat:
    """The format that a file's suffix tells; text for all unknown ones."""
    name = path.partition("::")[0].partition("?")[0].lower()
    for kind, suffixes in _SUFFIXES.items():
        if name.endswith(suffixes):
            return kind
    return "text"


def _check_kinds(name: str, files: tuple[SourceFile, ...]) -> None:
    tokens = [file for file in files if file.format in _TOKEN_FORMATS]
    if tokens and len(tokens) != len(files):
        other = next(file.path for file in files if file.format not in _TOKEN_FORMATS)
        raise DataError(
            f"data.source: {name} mixes tokens ('{tokens[0].path}') and text ('{other}'); give "
            "each an entry {path, weight} of its own"
        )


def _formatted(pattern: str, asked: DataFormat, storages: Storages) -> Iterator[SourceFile]:
    """The files of one pattern with their formats."""
    if pattern == STDLIB:
        for path, named in _stdlib_files():
            yield SourceFile(os.path.realpath(path), named)
        return
    remote = is_url(pattern)
    storage = storages.of(pattern)
    path = pattern if remote else local_path(pattern)
    try:
        # Over https there are no folders to be seen, only the files in them.
        if storage.kind(path) == "folder" or (remote and asked == "tokens"):
            whole = _whole_folder(pattern, path, asked, storage)
            if whole is not None:
                yield whole
                return
        matches = list(_matches(pattern, path, remote, storage))
    except OSError as error:
        raise DataError(
            f"data.source: cannot list {error.filename or pattern!r}: {error.strerror}; check that "
            "it can be read"
        ) from error
    kinds = {path: format_of(path) for path, _ in matches}
    all_tokens = all(kind in _TOKEN_FORMATS for kind in kinds.values())
    kept = 0
    for path, named in matches:
        kind = _decide(asked, kinds[path], named, all_tokens)
        if kind is not None:
            kept += 1
            yield SourceFile(path if remote else os.path.realpath(path), named, kind)
    if not kept:
        raise DataError(
            f"data.source: {pattern!r} holds no {asked} file; name the files themselves, or "
            "correct format"
        )


def _decide(
    asked: DataFormat, by_suffix: FileFormat, named: bool, all_tokens: bool
) -> FileFormat | None:
    """How to read a file; None: leave it out."""
    if asked == AUTO:
        return "text" if by_suffix in _TOKEN_FORMATS and not all_tokens else by_suffix
    if asked == "text":
        return "text"
    if asked == "tokens":
        return by_suffix if by_suffix in _TOKEN_FORMATS else ("bin" if named else None)
    if asked == "hf":
        return None
    return asked if named or by_suffix == asked else None


def _whole_folder(
    pattern: str, path: str, asked: DataFormat, storage: Storage
) -> SourceFile | None:
    """The folder as one source, if it is one of tokens or of a Hugging Face dataset."""

    def has(name: str) -> bool:
        return storage.kind(storage.join(path, name)) == "file"

    real = path if is_url(path) else os.path.realpath(path)
    if asked in (AUTO, "tokens") and has(TOKEN_INDEX):
        return SourceFile(real, True, "tokens")
    if asked in (AUTO, "hf"):
        if has("state.json") and has("dataset_info.json"):
            return SourceFile(real, True, "hf", tuple(sorted(storage.walk(real))))
        if has("dataset_dict.json"):
            raise DataError(
                f"data.source: {pattern!r} holds several splits; name one of them, such as "
                f"'{storage.join(pattern, 'train')}'"
            )
    if asked == "hf":
        raise DataError(
            f"data.source: {pattern!r} is no Hugging Face dataset saved to disk (it has no "
            "state.json and dataset_info.json); save it with Dataset.save_to_disk"
        )
    return None


def _describe(pattern: str) -> str:
    if pattern == STDLIB:
        return f"Python {platform.python_version()} standard library"
    return pattern


def _absolute(pattern: str) -> str:
    if pattern == STDLIB:
        return f"{STDLIB}:{_stdlib_folder()}"
    return pattern if is_url(pattern) else os.path.abspath(local_path(pattern))


def _matches(pattern: str, path: str, remote: bool, storage: Storage) -> Iterator[tuple[str, bool]]:
    """(path, was named by the user) for every file of one pattern."""
    kind = storage.kind(path)
    where = "" if remote else f" (looked in {Path.cwd()})"
    if kind == "folder":
        yield from _some(
            storage.walk(path),
            f"data.source: the folder {pattern!r} holds no files (hidden ones do not count); name "
            "one that holds text files",
        )
    elif kind == "file":
        if not remote and not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError(f"data.source: {pattern!r} is not a regular file; name a text file")
        yield path, True
    elif glob.has_magic(path):
        yield from _some(
            storage.glob(path),
            f"data.source: no file matches {pattern!r}{where}; use '**' to cross folders, as in "
            "'books/**/*.txt'",
        )
    else:
        raise DataError(
            f"data.source: there is no file or folder {pattern!r}{where}; name text files, folders "
            "or globs such as 'books/*.txt', or use 'stdlib'"
        )


def _some(paths: Iterator[str], otherwise: str) -> Iterator[tuple[str, bool]]:
    found = False
    for path in paths:
        found = True
        yield path, False
    if not found:
        raise DataError(otherwise)


def _stdlib_folder() -> str:
    return os.path.realpath(sysconfig.get_paths()["stdlib"])


def _stdlib_files() -> Iterator[tuple[str, bool]]:
    folder = _stdlib_folder()
    paths = (p for p in _LOCAL.walk(folder, _STDLIB_LEFT_OUT) if p.endswith(".py"))
    yield from _some(
        paths,
        f"data.source=stdlib: this Python has no library sources in {folder} (a stripped or "
        "zipped installation); name text files in data.source instead",
    )
