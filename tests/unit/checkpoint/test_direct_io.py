"""Files written once, front to back, whole or not at all."""

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everstep.checkpoint import direct_io
from everstep.checkpoint.direct_io import (
    ALIGN_BYTES,
    StreamWriter,
    make_directory,
    publish,
    sync_directory,
    write_durable,
)

SIZES = [0, 1, 4095, 4096, 4097, 8191, 8192, 8193, 3 * 8192, 20_000]


@pytest.fixture(params=["direct", "refused at open", "refused at write"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """File systems that take O_DIRECT, or refuse it early or late."""
    real_open, real_write = os.open, os.write
    direct: set[int] = set()

    def opened(path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        if flags & os.O_DIRECT and request.param == "refused at open":
            os.close(real_open(path, flags & ~os.O_DIRECT, mode))
            raise OSError(errno.EINVAL, "no direct I/O", str(path))
        fd = real_open(path, flags, mode, **more)
        direct.add(fd) if flags & os.O_DIRECT else direct.discard(fd)
        return fd

    def written(fd: int, data: Any) -> int:
        if fd in direct and request.param == "refused at write":
            direct.discard(fd)
            raise OSError(errno.EINVAL, "no direct I/O")
        return real_write(fd, data)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "write", written)
    return str(request.param)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_appended_is_in_the_file(tmp_path: Path, file_system: str, size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()
    with StreamWriter(tmp_path / "f", staging_bytes=2 * ALIGN_BYTES) as out:
        for begin in range(0, size, 3000):
            out.append(data[begin : begin + 3000])
        assert out.finish() == size
        if file_system != "direct" and size:
            assert not out.direct
    assert (tmp_path / "f").read_bytes() == data


@pytest.mark.parametrize("lengths", [[4096, 100, 4096], [1, 1, 1], [8192, 4095]])
def test_short_writes_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lengths: list[int]
) -> None:
    real_write, left = os.write, iter(lengths)

    def written(fd: int, data: Any) -> int:
        return real_write(fd, data[: next(left, len(data))])

    data = bytes(range(256)) * 200
    with StreamWriter(tmp_path / "f", staging_bytes=4 * ALIGN_BYTES) as out:
        monkeypatch.setattr(os, "write", written)
        out.append(data)
        out.finish()
    assert (tmp_path / "f").read_bytes() == data


def test_space_is_filled_in_place(tmp_path: Path) -> None:
    with StreamWriter(tmp_path / "f", staging_bytes=ALIGN_BYTES) as out:
        for value in range(5):
            space = out.space()
            space[:1500] = value
            out.advance(min(1500, len(space)))
        out.finish()
    content = (tmp_path / "f").read_bytes()
    assert [content.count(value) for value in range(5)] == [1500, 1500, 1096, 1500, 1500]


@pytest.mark.parametrize("early", [1, ALIGN_BYTES, 3 * ALIGN_BYTES])
def test_what_is_there_goes_to_an_idle_disk_before_the_buffer_is_full(
    tmp_path: Path, file_system: str, monkeypatch: pytest.MonkeyPatch, early: int
) -> None:
    monkeypatch.setattr(direct_io, "EARLY_BYTES", early)
    data = np.random.default_rng(0).integers(0, 256, 100_003, dtype=np.uint8)
    done = 0
    with StreamWriter(tmp_path / "f", staging_bytes=4 * ALIGN_BYTES) as out:
        while done < len(data):
            space = out.space()
            n = min(len(space), 1777, len(data) - done)
            space[:n] = data[done : done + n]
            out.advance(n)
            done += n
        assert out.finish() == len(data)
    assert (tmp_path / "f").read_bytes() == data.tobytes()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("misplaced", [0, 1])
def test_memory_is_written_from_where_it_is(
    tmp_path: Path, file_system: str, size: int, misplaced: int
) -> None:
    memory = np.frombuffer(mmap.mmap(-1, 40_960), np.uint8)[misplaced:]
    memory[:size] = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    with StreamWriter(tmp_path / "f", staging_bytes=ALIGN_BYTES) as out:
        for begin in range(0, size, 2 * ALIGN_BYTES):
            out.write_from(memory[begin : min(size, begin + 2 * ALIGN_BYTES)])
        assert out.finish() == size
    assert (tmp_path / "f").read_bytes() == memory[:size].tobytes()


def test_what_is_staged_is_not_overtaken(tmp_path: Path) -> None:
    with StreamWriter(tmp_path / "f") as out:
        out.write_from(np.zeros(ALIGN_BYTES + 1, np.uint8))
        with pytest.raises(ValueError, match="1 staged bytes come first"):
            out.write_from(np.zeros(ALIGN_BYTES, np.uint8))


def test_an_existing_file_is_never_touched(tmp_path: Path, file_system: str) -> None:
    (tmp_path / "f").write_text("mine")
    with pytest.raises(FileExistsError):
        StreamWriter(tmp_path / "f")
    with pytest.raises(FileExistsError):
        write_durable(tmp_path / "f", b"other")
    assert (tmp_path / "f").read_text() == "mine"


def test_staging_must_be_aligned(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a multiple of 4096"):
        StreamWriter(tmp_path / "f", staging_bytes=5000)


def _fail(*args: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["write", "fdatasync", "ftruncate"])
def test_after_an_error_the_file_is_gone_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def write() -> None:
        with StreamWriter(tmp_path / "f", staging_bytes=ALIGN_BYTES) as out:
            out.append(bytes(10_000))
            out.finish()

    monkeypatch.setattr(os, call, _fail)
    with pytest.raises(OSError, match=rf"No space left.*{tmp_path}/f") as caught:
        write()
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_finished_is_gone(tmp_path: Path) -> None:
    with StreamWriter(tmp_path / "f") as out:
        out.append(b"something")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_small_files_are_whole_or_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(os, call, _fail)
    with pytest.raises(OSError, match="No space left"):
        write_durable(tmp_path / "f", b"data")
    with pytest.raises(OSError, match="No space left"):
        publish(tmp_path / "f", b"data", tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [b"data", b"other"])
def test_nothing_is_replaced(tmp_path: Path, data: bytes) -> None:
    final, temporary = tmp_path / "f", tmp_path / "t"
    publish(final, b"data", temporary)
    with pytest.raises(FileExistsError):
        publish(final, data, temporary)
    assert final.read_bytes() == b"data"
    assert list(tmp_path.iterdir()) == [final]


def test_directories_are_made_durably(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(direct_io, "sync_directory", synced.append)
    make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert synced == [tmp_path, tmp_path / "a"]
    make_directory(tmp_path / "a" / "b")
    assert len(synced) == 2


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The calls that make something durable or visible, in order."""
    calls: list[str] = []

    def noted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return real(*args, **kwargs)

        return call

    for name in ("write", "fsync", "link", "fdatasync", "ftruncate"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    return calls


def test_bytes_are_durable_before_they_are_visible(tmp_path: Path, order: list[str]) -> None:
    publish(tmp_path / "f", b"data", tmp_path / "t")
    assert order == ["write", "fsync", "link", "fsync"]
    publish(tmp_path / "g", b"data", tmp_path / "t", settle=False)
    assert order[4:] == ["write", "fsync", "link"]


def test_the_size_is_cut_before_the_sync(tmp_path: Path, order: list[str]) -> None:
    with StreamWriter(tmp_path / "f") as out:
        out.append(b"data")
        out.finish()
    assert order == ["write", "ftruncate", "fdatasync"]


def test_syncing_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sync_directory(tmp_path / "none")


def test_buffers_are_used_again_and_by_one_file_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_io, "STAGING_BYTES", 2 * ALIGN_BYTES)
    monkeypatch.setattr(direct_io, "EARLY_BYTES", ALIGN_BYTES)
    kept: list[np.ndarray] = []
    monkeypatch.setattr(direct_io, "_spare", kept)
    rng = np.random.default_rng(0)
    for attempt in range(3):
        data = {n: rng.integers(0, 256, 100_000, dtype=np.uint8) for n in ("a", "b")}
        folder = tmp_path / str(attempt)
        folder.mkdir()
        with (
            StreamWriter(folder / "a", 2 * ALIGN_BYTES) as a,
            StreamWriter(folder / "b", 2 * ALIGN_BYTES) as b,
        ):
            for begin in range(0, 100_000, 5_000):
                a.append(data["a"][begin : begin + 5_000])
                b.append(data["b"][begin : begin + 5_000])
            a.finish()
            b.finish()
        for name, expected in data.items():
            assert (folder / name).read_bytes() == expected.tobytes()
        addresses = {buffer.ctypes.data for buffer in kept}
        assert len(addresses) == len(kept) == direct_io.BUFFERS


def test_after_an_error_no_buffer_is_lost_or_kept_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_io, "STAGING_BYTES", 2 * ALIGN_BYTES)
    kept: list[np.ndarray] = []
    monkeypatch.setattr(direct_io, "_spare", kept)
    monkeypatch.setattr(os, "write", _fail)

    def write() -> None:
        with StreamWriter(tmp_path / "f", 2 * ALIGN_BYTES) as out:
            out.append(bytes(100_000))
            out.finish()

    with pytest.raises(OSError, match="No space left"):
        write()
    addresses = {buffer.ctypes.data for buffer in kept}
    assert 2 <= len(addresses) == len(kept) <= direct_io.BUFFERS
