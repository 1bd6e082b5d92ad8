"""Data by URL: in memory, over http, in an object store; changes are noticed, secrets kept."""

import contextlib
import datetime
import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from rich.console import Console

from everstep.config_view import show_config
from everstep.data_tokenize import tokenize
from everstep.trainer.config import DataConfig, SourceConfig
from everstep.trainer.config_load import dump_config, parse_config
from everstep.trainer.data import documents, open_corpus
from everstep.trainer.data.storage import RemoteStorage, Storage, Storages, is_url
from everstep.trainer.errors import DataError
from tests.support.corpora import data_config, write_texts
from tests.support.s3_server import S3Server


def entry_config(path: str | list[str], tokenizer: str = "bytes", **fields: Any) -> DataConfig:
    entry = SourceConfig(path=path, **fields)
    return DataConfig(source=[entry], tokenizer=tokenizer, seq_len=8, global_batch=4, held_out=0.1)


@pytest.fixture
def memory() -> Iterator[Any]:
    """The file system memory://, with some text in it; empty again afterwards."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    for number in range(12):
        fs.pipe_file(f"/books/{number}.txt", f"book {number}: grün und 東京\n".encode() * 9)
    fs.pipe_file("/books/.hidden", b"hidden")
    fs.pipe_file("/web/a.jsonl", b"".join(b'{"text": "row %d"}\n' % i for i in range(99)))
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of remote files are trusted at once."""
    monkeypatch.setattr("everstep.trainer.data.storage.REMOTE_YOUNG_S", -1.0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are hashed, as they are."""
    read: list[str] = []
    really_hash = documents.hash_file

    def counting_hash(path: str, storage: Storage, must_be_text: bool) -> tuple[str, int]:
        read.append(path)
        return really_hash(path, storage, must_be_text)

    monkeypatch.setattr(documents, "hash_file", counting_hash)
    return read


def local_copy(fs: Any, folder: str, to: Path) -> Path:
    to.mkdir()
    for path in fs.find(folder):
        (to / Path(path).name).write_bytes(fs.cat_file(path))
    return to


def test_a_url_is_the_same_corpus_as_its_files(memory: Any, tmp_path: Path) -> None:
    local = open_corpus(data_config(local_copy(memory, "/books", tmp_path / "b")), tmp_path / "one")
    for number, url in enumerate(["memory://books", "memory://books/*.txt", "memory:///books/"]):
        corpus = open_corpus(data_config(url), tmp_path / f"cache{number}")
        assert corpus.documents == 12
        assert corpus.digest == local.digest
        assert corpus.text_digest == local.text_digest
    one = open_corpus(data_config("memory://books/3.txt", global_batch=1), tmp_path / "cache")
    assert one.documents == 1
    rows = open_corpus(data_config("memory://web/a.jsonl"), tmp_path / "cache")
    assert rows.documents == 99


def test_changes_are_noticed_and_settled_files_not_read_again(
    memory: Any, tmp_path: Path, settled: None, reads: list[str]
) -> None:
    config, cache = data_config("memory://books"), tmp_path / "cache"
    first = open_corpus(config, cache)
    assert len(reads) == 12
    reads.clear()
    assert open_corpus(config, cache).digest == first.digest
    assert open_corpus(config, cache, build=False).digest == first.digest
    assert reads == []
    memory.pipe_file("/books/3.txt", b"another book " * 9)
    changed = open_corpus(config, cache)
    assert reads == ["memory:///books/3.txt"]
    assert changed.digest != first.digest


def test_young_files_are_read_again_but_not_by_every_rank(
    memory: Any, tmp_path: Path, reads: list[str]
) -> None:
    config, cache = data_config("memory://books"), tmp_path / "cache"
    first = open_corpus(config, cache)
    reads.clear()
    assert open_corpus(config, cache, build=False).digest == first.digest
    assert reads == []
    open_corpus(config, cache)
    assert len(reads) == 12


def test_where_nothing_tells_of_changes_contents_are_hashed(
    memory: Any, tmp_path: Path, settled: None, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    really = type(memory).info

    def bare(self: Any, path: str, **kwargs: Any) -> dict[str, Any]:
        return {k: v for k, v in really(self, path, **kwargs).items() if k != "created"}

    monkeypatch.setattr(type(memory), "info", bare)
    config, cache = data_config("memory://books"), tmp_path / "cache"
    first = open_corpus(config, cache)
    reads.clear()
    same_size = memory.cat_file("/books/3.txt").replace(b"book 3", b"book 4")
    memory.pipe_file("/books/3.txt", same_size)
    assert open_corpus(config, cache).digest != first.digest
    assert len(reads) == 12


@pytest.mark.parametrize(
    ("info", "trusted"),
    [
        ({"ETag": '"abc"'}, True),
        ({"generation": 7}, True),
        ({"mtime": 1e9}, True),
        ({"LastModified": datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)}, True),
        ({"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}, True),
        ({"updated": "2020-01-01T00:00:00Z"}, True),
        ({"updated": "yesterday"}, False),
        ({"mtime": 1e12}, False),
        ({}, False),
    ],
)
def test_what_file_systems_tell(
    memory: Any, monkeypatch: pytest.MonkeyPatch, info: dict[str, Any], trusted: bool
) -> None:
    given = {"size": 5, "type": "file", **info}
    monkeypatch.setattr(type(memory), "info", lambda self, path: given)
    stamp, settled = RemoteStorage("memory://x", {}).stamp("memory://x")
    assert settled is trusted
    assert json.loads(json.dumps(stamp)) == stamp
    assert stamp[0] == 5


def test_mistakes_with_urls(memory: Any, tmp_path: Path) -> None:
    for source, says in [
        ("memory://nothing/here", r"there is no file or folder 'memory://nothing/here'; name"),
        ("memory://books/*.rst", r"no file matches 'memory://books/\*.rst'; use"),
        ("nosuch://x/y", r"(cannot reach|needs another package).*"),
        ("memory://books/.hidden/deeper", "there is no file or folder"),
    ]:
        with pytest.raises(DataError, match=says) as caught:
            open_corpus(data_config(source), tmp_path / "cache")
        assert "\n" not in str(caught.value)
    assert not is_url("c:/windows")
    assert not is_url("file:///tmp/x")


def test_a_file_url_is_a_local_file(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    by_url = open_corpus(data_config(f"file://{folder}"), tmp_path / "cache")
    assert by_url.digest == open_corpus(data_config(folder), tmp_path / "cache").digest


def test_errors_of_the_library_are_one_sentence(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LibraryError(Exception):
        pass

    def fail(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise LibraryError("no credentials\nwere found")

    monkeypatch.setattr(type(memory), "_open", fail)
    with pytest.raises(DataError, match=r"cannot read '.*3.txt': no credentials were found; make"):
        open_corpus(data_config("memory://books/3.txt"), tmp_path / "cache")


def test_a_chained_url(memory: Any, tmp_path: Path) -> None:
    import io
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("in/a.jsonl", memory.cat_file("/web/a.jsonl"))
        archive.writestr("in/b.txt", "text " * 50)
    memory.pipe_file("/archive.zip", buffer.getvalue())
    corpus = open_corpus(data_config("zip://in/*::memory://archive.zip"), tmp_path / "cache")
    assert corpus.documents == 100


def test_secrets_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUR_SECRET", "hunter2")
    seen: dict[str, Any] = {}

    def url_to_fs(url: str, **options: Any) -> tuple[Any, str]:
        seen.update(options)
        return fsspec.filesystem("memory"), url

    monkeypatch.setattr("fsspec.core.url_to_fs", url_to_fs)
    options = {"secret": "$OUR_SECRET", "client": {"token": "${OUR_SECRET}"}, "anon": False}
    Storages(options).of("s3://bucket/x")
    assert seen == {"secret": "hunter2", "client": {"token": "hunter2"}, "anon": False}
    with pytest.raises(DataError, match=r"storage_options.key=\$NOT_SET names the environment va"):
        Storages({"key": "$NOT_SET"}).of("s3://bucket/x")


def test_printed_configs_hold_no_secrets(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "train: {steps: 1}\n"
        "data:\n"
        "  source:\n"
        "    - path: s3://b/x.jsonl\n"
        "      storage_options: {key: AKIA, secret: $MINE, endpoint_url: http://here, "
        "client_kwargs: {aws_session_token: zzz}}\n"
    )
    shown = show_config(str(path), [], 1)
    assert "AKIA" not in shown
    assert "zzz" not in shown
    assert "$MINE" in shown
    assert "http://here" in shown
    config = parse_config(path.read_text(), "x")
    assert parse_config(dump_config(config), "x") == config


def test_tokens_are_fetched_once(
    memory: Any, tmp_path: Path, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_texts(tmp_path / "texts")
    with (tmp_path / "log").open("w") as log:
        source = SourceConfig(path=str(folder))
        tokenize(
            source,
            "bytes",
            tmp_path / "tokens",
            workers=1,
            shard_tokens=1000,
            console=Console(file=log),
        )
    memory.put(str(tmp_path / "tokens"), "/tokens", recursive=True)
    expected = open_corpus(entry_config(str(tmp_path / "tokens")), tmp_path / "one").digest

    opened: list[str] = []
    really_open = RemoteStorage.open
    monkeypatch.setattr(
        RemoteStorage,
        "open",
        lambda self, path, seek=False: opened.append(path) or really_open(self, path, seek),
    )
    config, cache = entry_config("memory://tokens", "auto"), tmp_path / "cache"
    seen: list[float] = []
    corpus = open_corpus(config, cache, progress=lambda done, total: seen.append(done / total))
    assert corpus.digest == expected
    assert seen[-1] == 1.0
    shards = [path for path in opened if path.endswith(".bin")]
    assert len(shards) == len(set(shards)) > 2
    opened.clear()
    assert open_corpus(config, cache, build=False).digest == expected
    assert open_corpus(config, cache).digest == expected
    assert not [path for path in opened if path.endswith(".bin")]

    (local,) = cache.glob("fetched/*/tokens-00000-000.bin")
    local.write_bytes(local.read_bytes()[:-2])
    assert open_corpus(config, cache).digest == expected, "fetched again"
    damaged = bytearray(memory.cat_file("/tokens/tokens-00000-000.bin"))
    damaged[0] ^= 1
    memory.pipe_file("/tokens/tokens-00000-000.bin", bytes(damaged))
    with pytest.raises(DataError, match="is not what its index says"):
        open_corpus(config, tmp_path / "fresh")
    assert not list((tmp_path / "fresh").rglob("*.tmp"))


def test_a_remote_array_is_fetched_again_when_it_changes(
    memory: Any, tmp_path: Path, settled: None
) -> None:
    def put(tokens: Any) -> None:
        np.save(tmp_path / "a.npy", np.array(tokens, np.uint16))
        memory.pipe_file("/a.npy", (tmp_path / "a.npy").read_bytes())

    config, cache = entry_config("memory://a.npy"), tmp_path / "cache"
    with pytest.raises(DataError, match="there is no file or folder"):
        open_corpus(config, cache)
    put(range(200))
    with pytest.raises(DataError, match=r"has no copy of 'memory:///a.npy' on this host"):
        open_corpus(entry_config("memory:///a.npy"), cache, build=False)
    assert open_corpus(config, cache).tokens_train[:].tolist() == list(range(180))
    assert open_corpus(config, cache, build=False).tokens_train.size == 180
    put(range(5, 205))
    assert open_corpus(config, cache).tokens_train[:3].tolist() == [5, 6, 7]


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """A plain http server, without ranges, as many are."""
    handler = functools.partial(_Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_over_http(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    folder = write_texts(tmp_path / "texts", count=3)
    lines = [json.dumps({"text": f"row {i} " * 40}) for i in range(2000)]
    (folder / "web.jsonl").write_text("\n".join(lines))
    with (tmp_path / "log").open("w") as log:
        source = SourceConfig(path=str(folder / "web.jsonl"))
        tokenize(
            source,
            "bytes",
            folder / "tokens",
            workers=1,
            shard_tokens=10**6,
            console=Console(file=log),
        )
    with serving(folder) as url:
        for source, local in [
            (entry_config(f"{url}/web.jsonl"), entry_config(str(folder / "web.jsonl"))),
            (entry_config(f"{url}/001.txt"), entry_config(str(folder / "001.txt"))),
            (
                entry_config(f"{url}/tokens", "auto", format="tokens"),
                entry_config(str(folder / "tokens"), "auto"),
            ),
        ]:
            remote = open_corpus(source, tmp_path / "cache")
            assert remote.digest == open_corpus(local, tmp_path / "cache").digest
        with pytest.raises(DataError, match=r"there is no file or folder 'http://.*/nothing.txt'"):
            open_corpus(data_config(f"{url}/nothing.txt"), tmp_path / "cache")
    with pytest.raises(DataError, match=r"data.source: cannot list 'http://"):
        open_corpus(data_config(f"{url}/001.txt"), tmp_path / "cache")


@pytest.mark.slow
def test_an_object_store(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_S3_SECRET", s3.options["secret"])
    fields: dict[str, Any] = {"storage_options": {**s3.options, "secret": "$TEST_S3_SECRET"}}
    fs = fsspec.filesystem("s3", **s3.options)
    url = f"{s3.new_url()}/texts"
    folder = write_texts(tmp_path / "texts")
    fs.put(str(folder), url, recursive=True)
    local = open_corpus(data_config(folder), tmp_path / "cache")
    for path in (url, f"{url}/*.txt"):
        assert open_corpus(entry_config(path, **fields), tmp_path / "cache").digest == local.digest
    fs.pipe_file(f"{url}/003.txt", b"another " * 60)
    changed = open_corpus(entry_config(url, **fields), tmp_path / "cache")
    assert changed.digest != local.digest
    with pytest.raises(DataError, match=r"data.source: .*s3://nobucket"):
        open_corpus(entry_config("s3://nobucket/x.txt", **fields), tmp_path / "cache")
