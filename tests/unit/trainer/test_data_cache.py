"""The token cache under damage, changed text, kills, company and full disks."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from everstep.trainer.data import Corpus, documents, open_corpus
from everstep.trainer.data.stamps import FileStamp, read_record, write_record
from everstep.trainer.data.storage import Storage
from everstep.trainer.data.token_file import HEADER_BYTES
from everstep.trainer.errors import DataError
from tests.support.corpora import data_config, edited, write_texts

DEADLINE_S = 60


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled after 20 ms, more than a tick of any local file system's clock."""
    monkeypatch.setattr("everstep.trainer.data.stamps.YOUNG_NS", 20_000_000)


def settle(*folders: Path) -> None:
    """Lets the clock go on until every file is settled."""
    deadline = time.monotonic() + DEADLINE_S
    paths = [path for folder in folders for path in folder.iterdir()]
    while not all(FileStamp.of(path).settled(time.time_ns()) for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def trusted_corpus(folder: Path, cache: Path) -> Corpus:
    """Opens a corpus until nothing of it is read again; needs ``trusting``."""
    settle(folder)
    open_corpus(data_config(folder), cache)
    settle(cache)
    return open_corpus(data_config(folder), cache)


def token_path(cache: Path) -> Path:
    (path,) = cache.glob("tokens-*.bin")
    return path


def everything(corpus: Corpus) -> list[int]:
    return [*corpus.tokens_train.tolist(), *corpus.tokens_held_out.tolist()]


def flipped(position: int) -> Callable[[bytes], bytes]:
    def flip(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[position] ^= 4
        return bytes(changed)

    return flip


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[:100], id="header cut"),
        pytest.param(lambda content: content[:-2], id="one token short"),
        pytest.param(lambda content: content + b"\0\0", id="one token long"),
        pytest.param(lambda content: os.urandom(len(content)), id="noise"),
        pytest.param(lambda content: bytes(len(content)), id="zeros"),
        pytest.param(flipped(3), id="bit in the magic"),
        pytest.param(lambda content: content.replace(b'"<u2"', b'"<i2"'), id="another type"),
        pytest.param(lambda content: content.replace(b'"<u2"', b'"<q!"'), id="no type"),
        pytest.param(lambda content: content.replace(b'"sha256"', b'"sha255"'), id="no checksum"),
        pytest.param(lambda content: content.replace(b'"text_dig', b'"xext_dig'), id="no key"),
        pytest.param(flipped(HEADER_BYTES), id="bit in the first token"),
        pytest.param(flipped(-1), id="bit in the last token"),
    ],
)
def test_a_damaged_cache_is_built_again(
    folder: Path, cache: Path, trusting: None, damage: Callable[[bytes], bytes]
) -> None:
    config = data_config(folder)
    first = everything(trusted_corpus(folder, cache))
    good = token_path(cache).read_bytes()
    edited(token_path(cache), damage)
    with pytest.raises(DataError, match=r"has no intact tokens of .*build=True"):
        open_corpus(config, cache, build=False)
    assert everything(open_corpus(config, cache)) == first
    assert token_path(cache).read_bytes() == good


@pytest.mark.parametrize("pattern", ["index-*", "*.verified"])
@pytest.mark.parametrize(
    "damage", [lambda content: content[:-3], flipped(-3), lambda content: b"", flipped(5)]
)
def test_damaged_records_are_ignored(
    folder: Path, cache: Path, trusting: None, pattern: str, damage: Callable[[bytes], bytes]
) -> None:
    first = trusted_corpus(folder, cache)
    (path,) = cache.glob(pattern)
    good = path.read_bytes()
    edited(path, damage)
    assert open_corpus(data_config(folder), cache).digest == first.digest
    assert path.read_bytes() == good


def test_an_edit_that_keeps_size_and_time_is_noticed(
    folder: Path, cache: Path, trusting: None
) -> None:
    config = data_config(folder)
    first = trusted_corpus(folder, cache)
    path = folder / "003.txt"
    before = path.stat()
    edited(path, flipped(0))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    changed = open_corpus(config, cache)
    assert changed.digest != first.digest
    assert changed.text_digest != first.text_digest
    edited(path, flipped(0))
    assert open_corpus(config, cache).digest == first.digest


def test_young_files_are_read_again(folder: Path, cache: Path) -> None:
    config = data_config(folder)
    open_corpus(config, cache)
    assert not list(cache.glob("index-*"))
    stamp = FileStamp.of(folder / "000.txt")
    changed_ns = max(stamp.mtime_ns, stamp.ctime_ns)
    assert not stamp.settled(changed_ns + 1_900_000_000)
    assert stamp.settled(changed_ns + 2_100_000_000)


def test_settled_files_are_not_read_again(
    folder: Path, cache: Path, trusting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    really_hash = documents.hash_file

    def counting_hash(path: str, storage: Storage, must_be_text: bool) -> tuple[str, int]:
        read.append(os.path.basename(path))
        return really_hash(path, storage, must_be_text)

    monkeypatch.setattr(documents, "hash_file", counting_hash)
    (folder / "noise.bin").write_bytes(b"\xff\xfe")
    config = data_config(folder)
    trusted_corpus(folder, cache)
    assert len(read) == 13
    read.clear()
    open_corpus(config, cache, build=False)
    assert read == []
    os.utime(folder / "005.txt")
    edited(folder / "007.txt", flipped(1))
    open_corpus(config, cache)
    assert read == ["005.txt", "007.txt"]


def test_a_file_system_that_deceives_costs_time_not_truth(
    folder: Path, cache: Path, trusting: None
) -> None:
    """The index says that a file, stamp unchanged, has contents that it does not have."""
    expected = trusted_corpus(folder, cache).digest
    (index_path,) = cache.glob("index-*")
    record = read_record(index_path)
    record[str(folder / "003.txt")][-1] = "0" * 64
    write_record(index_path, record)
    assert open_corpus(data_config(folder), cache).digest == expected
    assert read_record(index_path)[str(folder / "003.txt")][-1] != "0" * 64


def test_text_that_keeps_changing_is_an_error(folder: Path, cache: Path) -> None:
    def keep_writing(done: int, total: int) -> None:
        with (folder / "011.txt").open("a") as file:
            file.write("more\n")

    with pytest.raises(DataError, match=r"011.txt' changes while it is being read; start again"):
        open_corpus(data_config(folder), cache, progress=keep_writing)
    assert not list(cache.glob("*.tmp"))
    assert not list(cache.glob("tokens-*"))


def test_text_that_changes_once_is_read_again(folder: Path, cache: Path) -> None:
    calls = []

    def write_once(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 13:  # everything is identified, the first document is being tokenized
            edited(folder / "004.txt", lambda content: "東".encode() + content)
            (folder / "005.txt").unlink()

    corpus = open_corpus(data_config(folder), cache, progress=write_once)
    assert corpus.documents == 11
    assert corpus.skipped == ()
    assert corpus.digest == open_corpus(data_config(folder), cache.with_name("fresh")).digest
    assert not list(cache.glob("*.tmp"))


def test_without_build_nothing_is_built(folder: Path, cache: Path) -> None:
    with pytest.raises(DataError, match=r"no intact tokens of .*texts as it is on this host; give"):
        open_corpus(data_config(folder), cache, build=False)
    assert not cache.exists()
    expected = open_corpus(data_config(folder), cache)
    assert open_corpus(data_config(folder), cache, build=False).digest == expected.digest


@contextlib.contextmanager
def files_at_most(size_bytes: int) -> Iterator[None]:
    """Writing beyond this size fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full(folder: Path, cache: Path) -> None:
    with (
        files_at_most(HEADER_BYTES + 100),
        pytest.raises(DataError, match=r"cannot write the token cache in '.*': .*; make room"),
    ):
        open_corpus(data_config(folder), cache)
    assert not [path for path in cache.iterdir() if path.stat().st_size]
    assert open_corpus(data_config(folder), cache).documents == 12


def test_a_cache_folder_that_is_a_file(folder: Path, cache: Path) -> None:
    cache.write_text("in the way")
    with pytest.raises(DataError, match=r"cannot write the token cache in '.*': Not a directory"):
        open_corpus(data_config(folder), cache)


PROGRAM = """
import json, sys
from pathlib import Path
from everstep.trainer.config import DataConfig
from everstep.trainer.data import open_corpus

tokenized = False

def progress(done, total):
    global tokenized
    tokenized = tokenized or done > total / 2
    if sys.argv[3] == "stop" and done > 0.75 * total:
        print("halfway", flush=True)
        sys.stdin.read()

config = DataConfig(source=sys.argv[1], seq_len=8, global_batch=4, held_out=0.1)
corpus = open_corpus(config, Path(sys.argv[2]), progress=progress)
print(json.dumps([corpus.digest, tokenized, "torch" in sys.modules]))
"""


@contextlib.contextmanager
def opening(folder: Path, cache: Path, mode: str = "go") -> Iterator[subprocess.Popen[str]]:
    """Another process that opens the corpus; killed at the end if it still runs."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(cache), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_killed_in_the_middle(folder: Path, cache: Path) -> None:
    with opening(folder, cache, "stop") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "halfway\n"
        assert len(list(cache.glob("tokens-*.tmp"))) == 1
        process.send_signal(signal.SIGKILL)
        assert process.wait(DEADLINE_S) == -signal.SIGKILL
    assert not list(cache.glob("tokens-*.bin"))
    corpus = open_corpus(data_config(folder), cache)
    assert corpus.documents == 12
    assert not list(cache.glob("*.tmp")), "the dead process's file is gone"


def test_two_processes_at_once(tmp_path: Path, cache: Path) -> None:
    folder = write_texts(tmp_path / "many", count=40, size_bytes=20_000)
    with opening(folder, cache) as one, opening(folder, cache) as two:
        results = [json.loads(p.communicate(timeout=DEADLINE_S)[0]) for p in (one, two)]
    digest = open_corpus(data_config(folder), cache).digest
    assert sorted(results) == [[digest, False, False], [digest, True, False]]
    assert not list(cache.glob("*.tmp"))


def test_one_builds_the_other_waits(folder: Path, cache: Path) -> None:
    with opening(folder, cache, "stop") as builder:
        assert builder.stdout is not None
        assert builder.stdout.readline() == "halfway\n"
        with opening(folder, cache) as waiter:
            built = json.loads(builder.communicate(timeout=DEADLINE_S)[0].splitlines()[-1])
            waited = json.loads(waiter.communicate(timeout=DEADLINE_S)[0])
    digest = open_corpus(data_config(folder), cache).digest
    assert (built, waited) == ([digest, True, False], [digest, False, False])


def test_who_waits_takes_over_from_the_dead(folder: Path, cache: Path) -> None:
    with opening(folder, cache, "stop") as builder:
        assert builder.stdout is not None
        assert builder.stdout.readline() == "halfway\n"
        with opening(folder, cache) as waiter:
            builder.kill()
            waited = json.loads(waiter.communicate(timeout=DEADLINE_S)[0])
    assert waited == [open_corpus(data_config(folder), cache).digest, True, False]
    assert not list(cache.glob("*.tmp"))


def test_without_locks_it_works_all_the_same(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(file: object, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    cache.mkdir()
    (tag,) = {path.name.removeprefix("lock-") for path in _lock_files(folder, cache)}
    foreign = cache / f"tokens-x.bin.{tag}.0.tmp"
    foreign.write_text("somebody may be writing this")
    open_corpus(data_config(folder), cache)
    assert foreign.exists()


def _lock_files(folder: Path, cache: Path) -> list[Path]:
    open_corpus(data_config(folder), cache)
    token_path(cache).unlink()
    return list(cache.glob("lock-*"))
