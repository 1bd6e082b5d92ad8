"""From ``data.source`` to a list of files: the standard library, files, folders, globs."""

import glob
import os
import platform
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from everstep.trainer.errors import DataError

STDLIB = "stdlib"
"""The source that is there on every machine: the sources of the Python standard library."""

_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


@dataclass(frozen=True)
class SourceFile:
    """One file that the corpus may read."""

    path: str
    """Absolute, with links resolved."""
    named: bool
    """The user wrote this very name: if it cannot be read as text, that is an error."""


@dataclass(frozen=True)
class Sources:
    """The files of a corpus, each once, sorted by path."""

    name: str
    """For people: 'Python 3.11.7 standard library', or the patterns as written."""
    key: str
    """Identifies the patterns on this machine, whatever the working directory."""
    files: tuple[SourceFile, ...]


def find_files(source: str | list[str], leave_out: Path | None = None) -> Sources:
    """Lists the files of ``data.source``.

    A name that exists is that file or folder, even with glob characters in it; ``**`` crosses
    folders. Folders are read recursively, without hidden entries and without following links to
    folders. 'stdlib' is a keyword: a folder of this name is './stdlib'. What lies below the folder
    ``leave_out`` (a run directory: its logs are no text to train on) is found only by its own name.

    Raises:
        DataError: nothing is there, or a pattern or folder yields no file.
    """
    patterns = [source] if isinstance(source, str) else source
    if not patterns:
        raise DataError(
            "data.source is an empty list: name text files, folders or globs, or use 'stdlib'"
        )
    below = None if leave_out is None else os.path.join(os.path.realpath(leave_out), "")
    named: dict[str, bool] = {}
    for pattern in patterns:
        for path, is_named in _matches(pattern):
            real = os.path.realpath(path)
            if below is not None and real.startswith(below) and not is_named:
                continue
            named[real] = named.get(real, False) or is_named
    return Sources(
        name=", ".join(_describe(pattern) for pattern in patterns),
        key="\n".join(_absolute(pattern) for pattern in patterns),
        files=tuple(SourceFile(path, named[path]) for path in sorted(named)),
    )


def _describe(pattern: str) -> str:
    if pattern == STDLIB:
        return f"Python {platform.python_version()} standard library"
    return pattern


def _absolute(pattern: str) -> str:
    if pattern == STDLIB:
        return f"{STDLIB}:{_stdlib_folder()}"
    return os.path.abspath(os.path.expanduser(pattern))


def _matches(pattern: str) -> Iterator[tuple[str, bool]]:
    """(path, was named by the user) for every file of one pattern."""
    if pattern == STDLIB:
        yield from _stdlib_files()
        return
    path = os.path.expanduser(pattern)
    if os.path.isdir(path):
        yield from _folder_files(pattern, path)
    elif os.path.exists(path):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError(f"data.source: {pattern!r} is not a regular file; name a text file")
        yield path, True
    elif glob.has_magic(path):
        yield from _glob_files(pattern, path)
    else:
        raise DataError(
            f"data.source: there is no file or folder {pattern!r} (looked in {Path.cwd()}); name "
            "text files, folders or globs such as 'books/*.txt', or use 'stdlib'"
        )


def _folder_files(pattern: str, folder: str) -> Iterator[tuple[str, bool]]:
    found = False
    for path in _walk(folder, left_out=set()):
        found = True
        yield path, False
    if not found:
        raise DataError(
            f"data.source: the folder {pattern!r} holds no files (hidden ones do not count); name "
            "one that holds text files"
        )


def _glob_files(pattern: str, path: str) -> Iterator[tuple[str, bool]]:
    found = False
    for match in glob.iglob(path, recursive=True):
        if os.path.isfile(match):
            found = True
            yield match, False
    if not found:
        raise DataError(
            f"data.source: no file matches {pattern!r} (looked in {Path.cwd()}); use '**' to cross "
            "folders, as in 'books/**/*.txt'"
        )


def _stdlib_folder() -> str:
    return os.path.realpath(sysconfig.get_paths()["stdlib"])


def _stdlib_files() -> Iterator[tuple[str, bool]]:
    folder = _stdlib_folder()
    found = False
    for path in _walk(folder, left_out=_STDLIB_LEFT_OUT):
        if path.endswith(".py"):
            found = True
            yield path, False
    if not found:
        raise DataError(
            f"data.source=stdlib: this Python has no library sources in {folder} (a stripped or "
            "zipped installation); name text files in data.source instead"
        )


def _walk(top: str, left_out: set[str]) -> Iterator[str]:
    """Regular files below ``top``, hidden ones and folders named in ``left_out`` excepted."""

    def refuse(error: OSError) -> None:
        raise DataError(f"data.source: cannot list {error.filename!r}: {error.strerror}") from error

    for folder, folders, names in os.walk(top, onerror=refuse):
        folders[:] = [f for f in folders if f not in left_out and not f.startswith(".")]
        for name in names:
            path = os.path.join(folder, name)
            if not name.startswith(".") and os.path.isfile(path):
                yield path
