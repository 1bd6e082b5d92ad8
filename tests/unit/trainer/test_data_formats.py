"""jsonl, Parquet, Hugging Face datasets: the same rows are the same tokens, bad ones are told."""

import bz2
import gzip
import json
import lzma
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everstep.trainer.config import DataConfig, SourceConfig
from everstep.trainer.data import Corpus, open_corpus, pieces, rows
from everstep.trainer.data.sources import find_files
from everstep.trainer.errors import DataError
from tests.support.corpora import WORDS, data_config, write_texts

TEXTS = [" ".join(random.Random(i).choices(WORDS, k=1 + i % 40)) for i in range(300)] + [""]


def tokens_of(texts: list[str]) -> list[int]:
    return [token for text in texts if text for token in [*text.encode(), 256]]


def everything(corpus: Corpus) -> list[int]:
    return [t for part in corpus.parts for t in [*part.tokens_train[:], *part.tokens_held_out[:]]]


def source_config(path: object, **fields: Any) -> DataConfig:
    return data_config([SourceConfig(path=str(path), **fields)])  # type: ignore[arg-type]


def as_lines(texts: list[str], key: str = "text") -> bytes:
    lines = [json.dumps({"id": i, key: text}) for i, text in enumerate(texts)]
    return ("\n".join(lines) + "\n\n").encode()


def write_zst(path: Path, data: bytes) -> None:
    pa = pytest.importorskip("pyarrow")
    with pa.OSFile(str(path), "wb") as file, pa.CompressedOutputStream(file, "zstd") as stream:
        stream.write(data)


def write_parquet(path: Path, texts: list[Any], key: str = "text", group: int = 100) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.table({"id": list(range(len(texts))), key: texts})
    parquet.write_table(table, path, row_group_size=group)


WRITERS: dict[str, Callable[[Path, bytes], object]] = {
    ".jsonl": Path.write_bytes,
    ".ndjson": Path.write_bytes,
    ".jsonl.gz": lambda path, data: path.write_bytes(gzip.compress(data)),
    ".jsonl.bz2": lambda path, data: path.write_bytes(bz2.compress(data)),
    ".jsonl.xz": lambda path, data: path.write_bytes(lzma.compress(data)),
    ".jsonl.zst": write_zst,
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"web{suffix}"
    WRITERS[suffix](path, as_lines(TEXTS))
    corpus = open_corpus(data_config(path), tmp_path / "cache")
    assert everything(corpus) == tokens_of(TEXTS)
    assert corpus.documents == 300
    assert corpus.text_bytes == sum(len(text.encode()) for text in TEXTS)
    again = open_corpus(data_config(path), tmp_path / "cache", build=False)
    assert (again.digest, again.documents) == (corpus.digest, 300)


def test_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "web.parquet", TEXTS)
    corpus = open_corpus(data_config(tmp_path / "web.parquet"), tmp_path / "cache")
    assert everything(corpus) == tokens_of(TEXTS)
    write_parquet(tmp_path / "other.pq", TEXTS, key="content", group=7)
    config = source_config(tmp_path / "other.pq", text_key="content")
    assert everything(open_corpus(config, tmp_path / "cache")) == tokens_of(TEXTS)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shuffled dataset on disk: its rows are where its indices say."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("hf") / "data"
    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_dict({"text": TEXTS[::-1], "id": list(range(len(TEXTS)))})
    dataset.select(list(range(len(TEXTS) - 1, -1, -1))).save_to_disk(str(folder))
    return folder


def test_hugging_face_datasets(tmp_path: Path, hf_folder: Path) -> None:
    corpus = open_corpus(data_config(hf_folder), tmp_path / "cache")
    assert everything(corpus) == tokens_of(TEXTS)
    assert corpus.documents == 300
    found = find_files(str(hf_folder))
    assert [file.format for file in found.files] == ["hf"]
    assert any(path.endswith(".arrow") for path in found.files[0].members)


def test_a_changed_dataset_is_another_one(tmp_path: Path, hf_folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "data"
    for texts in (TEXTS, TEXTS[::-1]):
        dataset = datasets.Dataset.from_dict({"text": texts})
        dataset.save_to_disk(str(folder))
        corpus = open_corpus(data_config(folder), tmp_path / "cache")
        assert everything(corpus) == tokens_of(texts)


def test_formats_in_one_folder_are_told_apart_by_their_suffix(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "mixed", count=2)
    (folder / "a.jsonl").write_bytes(as_lines(["one", "two"]))
    write_parquet(folder / "b.parquet", ["three"])
    (folder / "stray.npy").write_bytes(b"\x93NUMPY\0")
    corpus = open_corpus(data_config(folder), tmp_path / "cache")
    assert corpus.documents == 2 + 2 + 1
    assert [Path(path).name for path in corpus.skipped] == ["stray.npy"]
    only = find_files(SourceConfig(path=str(folder), format="jsonl"))
    assert [Path(file.path).name for file in only.files] == ["a.jsonl"]
    as_text = open_corpus(source_config(folder / "a.jsonl", format="text"), tmp_path / "cache")
    assert as_text.documents == 1


def test_renamed_files_are_the_same_corpus(tmp_path: Path) -> None:
    for folder, names in (("one", ["a", "b"]), ("other", ["z", "y"])):
        (tmp_path / folder).mkdir()
        for name, texts in zip(names, (TEXTS[:100], TEXTS[100:]), strict=True):
            (tmp_path / folder / f"{name}.jsonl").write_bytes(as_lines(texts))
    one = open_corpus(data_config(tmp_path / "one"), tmp_path / "cache")
    other = open_corpus(data_config(tmp_path / "other"), tmp_path / "cache")
    assert (one.digest, one.text_digest) == (other.digest, other.text_digest)
    assert len(list((tmp_path / "cache").glob("tokens-*.bin"))) == 1


def test_another_key_is_another_corpus(tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    lines = [json.dumps({"text": f"text {i}", "title": f"title {i}"}) for i in range(50)]
    path.write_text("\n".join(lines))
    texts = open_corpus(source_config(path), tmp_path / "cache")
    titles = open_corpus(source_config(path, text_key="title"), tmp_path / "cache")
    assert texts.digest != titles.digest
    assert titles.decode(titles.tokens_train[:7].tolist()) == "title 0"


BAD_LINES = [
    ('{"text": "cut', r"line 3: the row is not JSON \("),
    ('["text"]', "line 3: the row is not a JSON object but a list"),
    ('{"content": "x", "id": 3}', r"has no field 'text' \(its fields: 'content', 'id'\)"),
    ('{"text": null}', "has null as 'text', not text"),
    ('{"text": 7}', "has a value of type int as 'text', not text"),
    ('{"text": "\\ud800"}', "half a surrogate pair in 'text'"),
]


@pytest.mark.parametrize(("line", "says"), BAD_LINES)
def test_bad_rows_are_errors_or_skipped(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "web.jsonl"
    good = as_lines(TEXTS[:40]).decode().splitlines()
    path.write_text("\n".join([*good[:2], line, *good[2:]]))
    with pytest.raises(DataError, match=says) as caught:
        open_corpus(source_config(path), tmp_path / "cache")
    assert "web.jsonl'" in str(caught.value)
    assert "on_bad_rows: skip" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("tokens-*"))
    corpus = open_corpus(source_config(path, on_bad_rows="skip"), tmp_path / "cache")
    assert everything(corpus) == tokens_of(TEXTS[:40])
    assert corpus.bad_rows == 1
    assert "line 3" in corpus.parts[0].bad_examples[0]
    again = open_corpus(source_config(path, on_bad_rows="skip"), tmp_path / "cache", build=False)
    assert again.bad_rows == 1


def test_invalid_utf8_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "web.jsonl"
    path.write_bytes(as_lines(["good"]) + b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match="line 3: the row is not JSON"):
        open_corpus(source_config(path), tmp_path / "cache")


def test_bad_rows_of_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "web.parquet", [*TEXTS[:120], None, "last"])
    with pytest.raises(DataError, match=r"web.parquet', row 121: the row has null as 'text'"):
        open_corpus(source_config(tmp_path / "web.parquet"), tmp_path / "cache")
    config = source_config(tmp_path / "web.parquet", on_bad_rows="skip")
    corpus = open_corpus(config, tmp_path / "cache")
    assert everything(corpus) == tokens_of([*TEXTS[:120], "last"])
    assert corpus.bad_rows == 1


def test_columns_that_are_not_there(tmp_path: Path, hf_folder: Path) -> None:
    write_parquet(tmp_path / "web.parquet", TEXTS)
    for path in (tmp_path / "web.parquet", hf_folder):
        with pytest.raises(DataError, match=r"has no column 'body'; set text_key to one of .*'id'"):
            open_corpus(source_config(path, text_key="body"), tmp_path / "cache")


def test_damaged_files(tmp_path: Path) -> None:
    write_parquet(tmp_path / "web.parquet", TEXTS)
    data = {
        "cut.parquet": (tmp_path / "web.parquet").read_bytes()[:-20],
        "no.parquet": b"not parquet at all, not at all",
        "cut.jsonl.gz": gzip.compress(as_lines(TEXTS))[:-500],
        "no.jsonl.gz": as_lines(TEXTS),
        "no.jsonl.bz2": as_lines(TEXTS),
        "no.jsonl.xz": as_lines(TEXTS),
        "no.jsonl.zst": as_lines(TEXTS),
        "bits.jsonl.gz": gzip.compress(as_lines(TEXTS))[:40] + b"\xff" * 2000,
    }
    for name, content in data.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}' is damaged or not of its format \(.*replac"):
            open_corpus(data_config(tmp_path / name), tmp_path / "cache")


def test_missing_packages_name_the_extra(
    tmp_path: Path, hf_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "web.parquet", TEXTS)
    write_zst(tmp_path / "web.jsonl.zst", as_lines(TEXTS))
    for package in ("pyarrow", "pyarrow.parquet", "datasets", "compression"):
        monkeypatch.setitem(sys.modules, package, None)
    for path, extra in [
        (tmp_path / "web.parquet", r"everstep\[parquet\]"),
        (tmp_path / "web.jsonl.zst", r"everstep\[parquet\]"),
        (hf_folder, r"everstep\[hf\]"),
    ]:
        with pytest.raises(DataError, match=rf"pip install '{extra}'"):
            open_corpus(data_config(path), tmp_path / "cache")


def test_several_splits_and_what_is_no_dataset(tmp_path: Path, hf_folder: Path) -> None:
    splits = tmp_path / "splits"
    splits.mkdir()
    (splits / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(DataError, match=r"holds several splits; name one of them, .*splits/train'"):
        find_files(str(splits))
    with pytest.raises(DataError, match="is no Hugging Face dataset saved to disk"):
        find_files(SourceConfig(path=str(tmp_path), format="hf"))
    with pytest.raises(DataError, match="holds no parquet file; name the files themselves"):
        find_files(SourceConfig(path=str(hf_folder), format="parquet"))


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_bytes(as_lines(texts))


@pytest.mark.parametrize(("name", "write"), [("a.jsonl", write_jsonl), ("b.pq", write_parquet)])
def test_a_file_of_rows_that_changes_before_it_is_read(
    tmp_path: Path, name: str, write: Callable[[Path, list[str]], None]
) -> None:
    write(tmp_path / name, TEXTS)
    calls = []

    def change_once(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 1:  # it is identified, and not yet read
            write(tmp_path / name, [*TEXTS[:250], "new"])

    config = data_config(tmp_path / name)
    corpus = open_corpus(config, tmp_path / "cache", progress=change_once)
    assert everything(corpus) == tokens_of([*TEXTS[:250], "new"])
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_file_of_rows_that_keeps_changing(tmp_path: Path) -> None:
    path = tmp_path / "b.parquet"
    write_parquet(path, TEXTS)
    texts = [*TEXTS]

    def keep_changing(done: int, total: int) -> None:
        texts.append("more")
        write_parquet(path, texts)

    with pytest.raises(DataError, match="changes while it is being read"):
        open_corpus(data_config(path), tmp_path / "cache", progress=keep_changing)
    assert not list((tmp_path / "cache").glob("tokens-*"))


def test_long_rows_are_cut_between_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 16)
    texts = ["grün 東京 " * 30, "x" * 15, "y" * 16, "z" * 17, "line\n" * 40]
    (tmp_path / "a.jsonl").write_bytes(as_lines(texts))
    corpus = open_corpus(data_config(tmp_path / "a.jsonl"), tmp_path / "cache")
    assert everything(corpus) == tokens_of(texts)


def test_lines_between_bytes_are_all_lines_once() -> None:
    import io

    data = b"".join(b"%d" % i * (i % 7) + b"\n" for i in range(60)) + b"no end"
    whole = data.splitlines(keepends=True)
    for step in (1, 2, 5, 13, 1000):
        got = [
            line
            for start in range(0, len(data), step)
            for _, line in rows.lines_between(io.BytesIO(data), start, min(start + step, len(data)))
        ]
        assert got == whole


def test_a_mixture_of_formats(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_lines(TEXTS))
    write_texts(tmp_path / "texts")
    config = DataConfig(
        source=[
            SourceConfig(path=str(tmp_path / "a.jsonl"), weight=3),
            SourceConfig(path=str(tmp_path / "texts")),
        ],
        seq_len=8,
        global_batch=4,
        held_out=0.1,
    )
    seen: list[float] = []
    corpus = open_corpus(config, tmp_path / "cache", progress=lambda d, t: seen.append(d / t))
    assert [part.weight for part in corpus.parts] == [3, 1]
    assert corpus.shares == [0.75, 0.25]
    assert corpus.documents == 312
    assert corpus.tokens_train.size == sum(part.tokens_train.size for part in corpus.parts)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    alone = open_corpus(source_config(tmp_path / "a.jsonl"), tmp_path / "cache", build=False)
    assert alone.digest == corpus.parts[0].digest
    counts = [np.bincount(part.tokens_train[:], minlength=257) for part in corpus.parts]
    mixed = 0.75 * counts[0] / counts[0].sum() + 0.25 * counts[1] / counts[1].sum()
    expected = -sum(f * np.log(f) for f in mixed if f)
    assert corpus.entropy_nats == pytest.approx(expected)


def test_a_part_that_is_too_small_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_lines(TEXTS))
    (tmp_path / "tiny.txt").write_text("tiny")
    entries = [SourceConfig(path=str(tmp_path / name)) for name in ("a.jsonl", "tiny.txt")]
    config = DataConfig(source=entries, seq_len=8, global_batch=4)
    with pytest.raises(DataError, match=r"tiny.txt has 5 tokens to train on, and one sample needs"):
        open_corpus(config, tmp_path / "cache")
