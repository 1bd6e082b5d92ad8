"""The contract of Store, for every store there is, S3 with a real server."""

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from everstep.checkpoint.errors import CheckpointError
from everstep.checkpoint.store import Store, check_key
from everstep.checkpoint.store_fsspec import PART_BYTES, FsspecStore
from everstep.checkpoint.store_local import LocalStore
from everstep.checkpoint.store_memory import MemoryStore
from everstep.checkpoint.stores import open_store

KINDS = ["local", "memory", "fsspec memory", "fsspec single writer", "s3"]
_NUMBERS = itertools.count()


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    number = next(_NUMBERS)
    match request.param:
        case "local":
            return LocalStore(tmp_path / "not" / "yet")
        case "memory":
            return MemoryStore()
        case "fsspec memory":
            return FsspecStore(f"memory://contract-{number}/runs/")
        case "fsspec single writer":
            return FsspecStore(f"memory://contract-{number}", single_writer=True)
        case _:
            server = request.getfixturevalue("s3")
            return FsspecStore(server.new_url(), server.options)


def _write(store: Store, key: str, data: bytes) -> int:
    with store.writer(key, len(data)) as out:
        out.append(data[:100])
        done = 100
        while done < len(data):
            space = out.space()
            n = min(len(space), len(data) - done)
            space[:n] = np.frombuffer(data[done : done + n], np.uint8)
            out.advance(n)
            done += n
        return out.finish()


def test_nothing_is_there_at_first(store: Store) -> None:
    assert store.list() == store.list("a") == store.list("a/b") == []
    assert store.size("a") is None
    assert store.size("a/b.json") is None
    with pytest.raises(FileNotFoundError):
        store.read("a/b.json")
    store.delete("a")
    store.delete("a/b.json")


def test_what_is_put_is_there(store: Store) -> None:
    store.put("a/b/one.json", b"0123456789")
    store.put("a/b/two.json", b"", settle=False)
    store.put("a/three", b"3")
    store.settle(["a/b", "a", ""])
    assert store.list() == ["a"]
    assert store.list("a") == ["b", "three"]
    assert store.list("a/b") == ["one.json", "two.json"]
    assert [store.size(f"a/b/{n}.json") for n in ("one", "two")] == [10, 0]
    assert store.size("a") is None or store.local_path() is not None
    assert store.read("a/b/one.json") == b"0123456789"
    assert store.read("a/b/two.json") == b""


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, None, b"0123456789"),
        (3, 4, b"3456"),
        (3, None, b"3456789"),
        (8, 5, b"89"),
        (4, 0, b""),
        (0, 3, b"012"),
        (10, 4, b""),
        (12, None, b""),
    ],
)
def test_ranges_are_read(store: Store, offset: int, length: int | None, expected: bytes) -> None:
    store.put("a", b"0123456789")
    assert store.read("a", offset, length) == expected


def test_nothing_is_replaced(store: Store) -> None:
    store.put("a/b", b"mine")
    for data in (b"mine", b"other"):
        with pytest.raises(FileExistsError):
            store.put("a/b", data)
    with pytest.raises(FileExistsError):
        _write(store, "a/b", bytes(200))
    assert store.read("a/b") == b"mine"
    assert store.list("a") == ["b"]


def test_of_several_that_put_at_once_one_succeeds(store: Store) -> None:
    begin, outcomes = threading.Barrier(4), list[str]()

    def put(number: int) -> None:
        begin.wait()
        try:
            store.put("generations/00002.json", b"%d" % number)
            outcomes.append(f"{number}")
        except FileExistsError:
            outcomes.append("lost")

    threads = [threading.Thread(target=put, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes)[1:] == ["lost"] * 3
    assert store.read("generations/00002.json").decode() == sorted(outcomes)[0]
    assert store.list("generations") == ["00002.json"]


@pytest.mark.parametrize("size", [100, 70_000, PART_BYTES + 5])
def test_large_objects_are_streamed(store: Store, size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
    assert _write(store, "step/pack", data) == size
    assert store.size("step/pack") == size
    assert store.read("step/pack") == data
    assert store.read("step/pack", size - 50, 50) == data[-50:]


@pytest.mark.parametrize("size", [200, PART_BYTES + 5])
def test_what_is_not_finished_is_not_there(store: Store, size: int) -> None:
    def break_off() -> None:
        with store.writer("step/pack", size) as out:
            out.append(bytes(size))
            raise KeyError

    with pytest.raises(KeyError):
        break_off()
    assert store.size("step/pack") is None
    assert store.list("step") == []
    assert _write(store, "step/pack", bytes(150)) == 150


def test_objects_and_folders_are_deleted(store: Store) -> None:
    for key in ("a/x/1", "a/x/2", "a/y", "ab"):
        store.put(key, b"data")
    store.delete("a/x")
    store.delete("a/y")
    assert store.size("a/x/1") is None
    assert store.read("ab") == b"data"
    assert "ab" in store.list()
    store.put("a/x/1", b"again")
    assert store.read("a/x/1") == b"again"


@pytest.mark.parametrize("key", ["", "/etc", "../a", "a/../b", "a//b", "a/", ".", "a b", "ä"])
def test_no_key_leaves_the_store(store: Store, key: str) -> None:
    acts: list[Callable[[], object]] = [
        lambda: store.size(key),
        lambda: store.read(key),
        lambda: store.put(key, b""),
        lambda: store.writer(key, 1),
        lambda: store.delete(key),
    ]
    if key:
        acts += [lambda: store.list(key), lambda: store.describe(key)]
    for act in acts:
        with pytest.raises(ValueError, match="expected relative segments"):
            act()
    assert store.list() == []


def test_it_says_where_things_are(store: Store) -> None:
    assert store.describe("a/b").endswith("a/b")
    assert store.describe("a/b").startswith(store.describe())
    path = store.local_path("a")
    assert path is None or str(path) == store.describe("a")
    assert isinstance(store, Store)


def test_paths_and_urls_are_opened(tmp_path: Path) -> None:
    for where in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        assert open_store(where).local_path("a") == tmp_path / "a"
    memory = MemoryStore()
    assert open_store(memory) is memory
    assert open_store("memory://x/y").describe("a") == "memory://x/y/a"
    with pytest.raises(CheckpointError, match=r"cannot be reached: .*nosuch"):
        open_store("nosuch://x")


class _LooksFirst(MemoryFileSystem):  # type: ignore[misc]
    """As most file systems of fsspec: ``mode="create"`` is a look, then a write."""

    protocol = "looks-first"


def test_a_store_that_only_looks_before_it_writes_is_refused() -> None:
    fsspec.register_implementation("looks-first", _LooksFirst, clobber=True)
    with pytest.raises(CheckpointError, match="two jobs could mix: pass single_writer=True"):
        FsspecStore("looks-first://x")
    FsspecStore("looks-first://x", single_writer=True).put("looked", b"at")


class _CreatesOnly(_LooksFirst):
    """As S3: the server decides. A request is answered when there are two."""

    protocol = "creates-only"
    requests = threading.Barrier(2, timeout=20)

    def _pipe_file(self, path: str, value: bytes, mode: str = "overwrite") -> None:
        super().pipe_file(path, value, mode=mode)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite") -> None:
        self.requests.wait()
        self._pipe_file(path, value, mode)


def test_creations_do_not_wait_for_each_other_where_the_store_decides() -> None:
    fsspec.register_implementation("creates-only", _CreatesOnly, clobber=True)
    store = FsspecStore("creates-only://x")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda key: store.put(key, b""), ["a", "b"]))
    assert store.list() == ["a", "b"]


def test_a_missing_bucket_is_an_error_of_one_line(request: pytest.FixtureRequest) -> None:
    server = request.getfixturevalue("s3")
    store = FsspecStore("s3://no-such-bucket/x", server.options)
    with pytest.raises(OSError, match="s3://no-such-bucket/x/a") as caught:
        store.put("a", b"")
    assert "\n" not in str(caught.value)


def test_keys_are_as_they_are_written() -> None:
    assert check_key("step-00000012-g00001/parts/00000.json")
    assert check_key("", root=True) == ""
