"""What of the user's folder goes along with a job, and the archive that carries it.

The archive is unpacked on every node, and its folder is the working directory of the job and of
all its ranks: what could be imported in the folder can be imported there. Hidden entries (``.git``,
``.venv``, caches, ``.env``), byte code, virtual environments and ``runs/`` stay behind, and so does
what the user names with ``--exclude`` or in ``.everstepignore``.
"""

import fnmatch
import os
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from everstep.cluster.job_errors import StagingError
from everstep.trainer.progress import short_bytes

IGNORE_FILE = ".everstepignore"
LEFT_OUT = (".*", "__pycache__", "*.pyc", "*.egg-info", "node_modules", "/runs", "/wandb")
LIMIT_BYTES = 100 * 2**20
"""Largest sum of file sizes; every node unpacks them, and the head node keeps them in memory."""
MOST_FILES = 20_000
_EPOCH = (1980, 1, 1, 0, 0, 0)
_OFFENDERS = 4


@dataclass(frozen=True, kw_only=True)
class StagedFile:
    """A file that goes along."""

    name: str
    """Path from the folder, with slashes."""
    path: Path
    """Where it is read."""
    size_bytes: int
    executable: bool = False


def is_left_out(name: str, patterns: Iterable[str]) -> bool:
    """Whether the entry at the relative path ``name`` stays behind.

    A pattern with a slash in it is matched with the whole path (a leading slash anchors it there),
    any other with the last part; a trailing slash means nothing.
    """
    last = name.rpartition("/")[2]
    for pattern in patterns:
        text = pattern.rstrip("/")
        if "/" in text:
            if fnmatch.fnmatchcase(name, text.lstrip("/")):
                return True
        elif fnmatch.fnmatchcase(last, text):
            return True
    return False


def ignored_by_file(folder: Path) -> list[str]:
    """Patterns of ``.everstepignore``: one a line; '#' begins a comment. Raises StagingError."""
    try:
        text = (folder / IGNORE_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise StagingError(f"{folder / IGNORE_FILE} cannot be read ({error})") from None
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def staged_files(
    folder: Path, exclude: Sequence[str] = (), never: Path | None = None
) -> list[StagedFile]:
    """Files of ``folder`` that go along, sorted by name; links are followed.

    What lies below ``never`` (a run directory) stays behind, whatever it is called.

    Raises:
        StagingError: there is no such folder, it cannot be read, or it is too large.
    """
    if not folder.is_dir():
        raise StagingError(f"--working-dir {folder} is no folder: name the one that has your code")
    patterns = [*LEFT_OUT, *ignored_by_file(folder), *exclude]
    found: list[StagedFile] = []
    for file in _walk(folder, "", patterns, never.resolve() if never else None, ()):
        found.append(file)
        if len(found) > MOST_FILES:
            break
    check_size(found, folder)
    return sorted(found, key=lambda file: file.name)


def check_size(
    files: Sequence[StagedFile],
    folder: Path,
    limit_bytes: int = LIMIT_BYTES,
    most_files: int = MOST_FILES,
) -> None:
    """Raise StagingError where this is more than code, naming what is largest."""
    total = sum(file.size_bytes for file in files)
    way_out = (
        f"leave out what the job does not need (--exclude NAME, or a line in {IGNORE_FILE}), "
        "choose another --working-dir, and put data on storage that all nodes see"
    )
    if len(files) > most_files:
        counts = _by_top(files, lambda _: 1)
        shown = ", ".join(f"{name} ({count} files)" for name, count in counts)
        raise StagingError(
            f"{folder} has more than {most_files} files to send with the job, most of them in "
            f"{shown}: {way_out}"
        )
    if total > limit_bytes:
        sizes = _by_top(files, lambda file: file.size_bytes)
        shown = ", ".join(f"{name} ({short_bytes(size)})" for name, size in sizes)
        raise StagingError(
            f"{folder} is too large to send with the job, {short_bytes(total)} where "
            f"{short_bytes(limit_bytes)} are allowed; largest: {shown}: {way_out}"
        )


def write_archive(target: Path, files: Sequence[StagedFile], texts: Mapping[str, str]) -> None:
    """Write a zip of ``files`` and of ``texts`` (name -> contents).

    The same contents give the same bytes, so that a cluster that has them gets them once. Raises
    StagingError for a file that cannot be read.
    """
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            try:
                data = file.path.read_bytes()
            except OSError as error:
                raise StagingError(
                    f"{file.path} cannot be read ({error.strerror}): make it readable, or leave it "
                    f"out with --exclude {file.name}"
                ) from error
            archive.writestr(_entry(file.name, file.executable), data)
        for name, text in sorted(texts.items()):
            archive.writestr(_entry(name, executable=False), text)


def _entry(name: str, executable: bool) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = (stat.S_IFREG | (0o755 if executable else 0o644)) << 16
    return entry


def _walk(
    folder: Path,
    prefix: str,
    patterns: Sequence[str],
    never: Path | None,
    inside: tuple[Path, ...],
) -> Iterator[StagedFile]:
    """``inside``: the real folders that this one is in, so that links cannot go round for ever."""
    real = folder.resolve()
    if real in inside or real == never:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise StagingError(
            f"{folder} cannot be listed ({error.strerror}): make it readable, or leave it out with "
            f"--exclude {prefix.rstrip('/') or folder.name}"
        ) from error
    if prefix and any(entry.name == "pyvenv.cfg" for entry in entries):
        return
    for entry in entries:
        name = f"{prefix}{entry.name}"
        if is_left_out(name, patterns):
            continue
        if entry.is_dir():
            yield from _walk(Path(entry.path), f"{name}/", patterns, never, (*inside, real))
        elif entry.is_file():  # neither sockets nor links to nothing
            facts = entry.stat()
            yield StagedFile(
                name=name,
                path=Path(entry.path),
                size_bytes=facts.st_size,
                executable=bool(facts.st_mode & stat.S_IXUSR),
            )


def _by_top(
    files: Sequence[StagedFile], weight: Callable[[StagedFile], int]
) -> list[tuple[str, int]]:
    """The entries of the folder that weigh most, heaviest first; folders end with a slash."""
    sums: dict[str, int] = {}
    for file in files:
        top, slash, _ = file.name.partition("/")
        sums[top + slash] = sums.get(top + slash, 0) + weight(file)
    return sorted(sums.items(), key=lambda item: (-item[1], item[0]))[:_OFFENDERS]
