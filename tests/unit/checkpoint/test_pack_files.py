"""Mapped files: fetched from disk or memory, and what happens where that is impossible."""

import os
from pathlib import Path

import numpy as np
import pytest

from everstep.checkpoint import pack_files
from everstep.checkpoint.errors import PackTruncatedError
from everstep.checkpoint.kernels import pages_missing, populate_pages
from everstep.checkpoint.pack_files import MappedFile, read_file

MIB = 2**20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).integers(0, 256, 9 * MIB + 7, np.uint8).tobytes())
    return path


def _evict(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def _ranges(size: int, step: int) -> list[tuple[int, int]]:
    return [(at, min(size, at + step)) for at in range(0, size, step)]


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("told", [False, True])
def test_everything_is_there_once_it_is_fetched(
    path: Path, cold: bool, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = path.read_bytes()
    if cold:
        _evict(path)
    file = MappedFile(path, len(expected))
    monkeypatch.setattr(file, "_told", told)
    found = bytearray()
    ranges = _ranges(len(expected), MIB)
    for (begin, end), _ in zip(ranges, file.fetch_all(ranges), strict=True):
        assert file.data[begin:end].tobytes() == expected[begin:end]
    for begin, end in _ranges(len(expected), 700_001):
        file.fetch(begin, end)
        assert not pages_missing(file.data[begin:end])
        found += file.data[begin:end].tobytes()
    assert found == expected
    file.close()


def test_what_is_in_memory_needs_no_thread(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(path.read_bytes())
    monkeypatch.setattr(pack_files, "ThreadPoolExecutor", None)
    file = MappedFile(path, size)
    assert len(list(file.fetch_all(_ranges(size, MIB)))) == 10
    file.close()


def test_a_walk_that_is_left_early_stops_reading(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = MappedFile(path, path.stat().st_size)
    monkeypatch.setattr(pack_files, "pages_missing", lambda data: True)
    fetched = file.fetch_all(_ranges(9 * MIB, MIB))
    next(fetched)
    fetched.close()
    file.close()


@pytest.mark.parametrize("missing", [False, True])
def test_what_cannot_be_read_is_an_error(
    path: Path, missing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages behind the end of a file that was cut cannot be read, as those of a broken disk."""
    size = path.stat().st_size
    file = MappedFile(path, size)
    os.truncate(path, 4 * MIB + 1)
    monkeypatch.setattr(pack_files, "pages_missing", lambda data: missing)
    file.fetch(0, 4 * MIB)
    for begin in (5 * MIB, 4 * MIB, 4 * MIB + 4096):
        with pytest.raises(OSError, match=r"Input/output error: .*/file'"):
            file.fetch(begin, 6 * MIB)
    with pytest.raises(OSError, match=r"Input/output error"):
        list(file.fetch_all(_ranges(size, MIB)))
    assert populate_pages(file.data[:0], told=True) == 0
    assert not pages_missing(file.data[:0])
    file.close()


def test_another_size(path: Path) -> None:
    with pytest.raises(PackTruncatedError, match="it has 9437191 bytes, expected 5"):
        MappedFile(path, 5)
    with pytest.raises(PackTruncatedError, match="expected 5"):
        read_file(path, 5)
    for open_it in (MappedFile, read_file):
        with pytest.raises(PackTruncatedError, match="the file is missing"):
            open_it(path.with_name("other"), 5)
