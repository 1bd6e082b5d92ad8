"""Sources that are tokens already: rows over several arrays, folders, .npy, raw .bin."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from everstep.data_tokenize import tokenize
from everstep.trainer.config import DataConfig, SourceConfig
from everstep.trainer.data import open_corpus, token_source, vocab_size_of
from everstep.trainer.data.sources import TOKEN_INDEX
from everstep.trainer.data.token_folder import decode_folder, encode_folder, read_folder
from everstep.trainer.data.token_row import TokenRow
from everstep.trainer.errors import DataError
from tests.support.corpora import data_config, edited, write_texts, write_tokenizer


def source_config(path: object, tokenizer: str = "auto", **fields: Any) -> DataConfig:
    entry = SourceConfig(path=str(path), **fields)
    return DataConfig(source=[entry], tokenizer=tokenizer, seq_len=8, global_batch=4, held_out=0.1)


@given(
    sizes=st.lists(st.integers(0, 7), max_size=6),
    start=st.integers(-3, 40),
    stop=st.integers(-3, 40),
)
def test_a_row_is_sliced_like_one_array(sizes: list[int], start: int, stop: int) -> None:
    parts = [np.arange(size, dtype=np.uint16) + 10 * i for i, size in enumerate(sizes)]
    whole = np.concatenate([*parts, np.empty(0, np.uint16)])
    row = TokenRow(parts)
    assert row.size == len(row) == whole.size
    np.testing.assert_array_equal(row[start:stop], whole[start:stop])
    np.testing.assert_array_equal(row[start:], whole[start:])
    np.testing.assert_array_equal(row[:], whole)
    low, high, _ = slice(start, stop).indices(whole.size)
    np.testing.assert_array_equal(row.part(low, high)[:], whole[start:stop])


def test_slices_inside_of_one_array_are_views() -> None:
    parts = [np.arange(10, dtype=np.uint16), np.arange(10, dtype=np.uint32)]
    row = TokenRow(parts)
    assert np.shares_memory(row[2:5], parts[0])
    assert np.shares_memory(row[10:20], parts[1])
    assert row[5:15].tolist() == [*range(5, 10), *range(5)]
    assert row.dtype == row[5:15].dtype == np.uint32
    with pytest.raises(ValueError, match="step 1"):
        row[::2]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def made(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of several shards, made with a tokenizer.json. Not to be changed."""
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("made")
    tokenizer = write_tokenizer(folder / "tokenizer.json", ("<unk>", "</s>"))
    run_tokenize(texts, folder / "tokens", tokenizer=str(tokenizer))
    tokenizer.unlink()
    return folder / "tokens"


def run_tokenize(source: object, output: Path, tokenizer: str = "bytes", **fields: Any) -> None:
    entry = SourceConfig(path=[str(source)], **fields)
    console = Console(file=output.with_name("console.txt").open("w"))
    with console.file:
        tokenize(entry, tokenizer, output, workers=2, shard_tokens=500, console=console)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "tokens"
    copy.mkdir()
    for path in made.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_a_folder_is_used_where_it_is(made: Path, tmp_path: Path) -> None:
    config = source_config(made)
    corpus = open_corpus(config, tmp_path / "cache")
    index = read_folder(made)
    assert len(index.shards) > 3
    assert corpus.documents == 12
    assert corpus.vocab_size == vocab_size_of(config) == index.tokenizer.vocab_size
    tokens = np.concatenate([corpus.tokens_train[:], corpus.tokens_held_out[:]])
    assert tokens.size == index.tokens
    assert int((tokens == index.tokenizer.eos_id).sum()) == 12
    assert tokens[-1] == index.tokenizer.eos_id
    assert corpus.decode(corpus.encode("grün 東京")) == "grün 東京"
    assert not list((tmp_path / "cache").rglob("*.bin"))
    again = open_corpus(config, tmp_path / "cache", build=False)
    assert again.digest == corpus.digest
    elsewhere = open_corpus(config, tmp_path / "other")
    assert elsewhere.digest == corpus.digest


def test_the_tokenizer_has_to_be_that_of_the_folder(made: Path, tmp_path: Path) -> None:
    same = open_corpus(source_config(made, str(made / "tokenizer.json")), tmp_path)
    assert same.tokenizer_digest == read_folder(made).tokenizer.digest
    with pytest.raises(DataError, match=r"another tokenizer .*=bytes .*set data.tokenizer=auto"):
        open_corpus(source_config(made, "bytes"), tmp_path)
    with pytest.raises(DataError, match=r"data.source has none; name a tokenizer.json, or use 'b"):
        open_corpus(source_config(made.parent / "console.txt"), tmp_path)


def test_folders_of_two_tokenizers_do_not_mix(made: Path, texts: Path, tmp_path: Path) -> None:
    run_tokenize(texts, tmp_path / "bytes")
    both = [str(made), str(tmp_path / "bytes")]
    with pytest.raises(DataError, match="were made with different tokenizers"):
        open_corpus(source_config(made).model_copy(update={"source": both}), tmp_path / "cache")
    entries = [SourceConfig(path=path) for path in both]
    with pytest.raises(DataError, match=r"were made with another tokenizer .* use one of them"):
        open_corpus(source_config(made).model_copy(update={"source": entries}), tmp_path / "cache")


def flip_last(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("tokens-00000-000.bin", flip_last, "is damaged: its checksum is not the one in its index"),
        (
            "tokens-00000-000.bin",
            lambda c: c[:-2],
            r"has 998 bytes, and its index says 1,000 bytes",
        ),
        (TOKEN_INDEX, lambda c: c[:-9], r"index '.*' is damaged: copy the folder again"),
        (TOKEN_INDEX, lambda c: c.replace(b'"documents": 12', b'"documents": 13'), "is damaged"),
        (TOKEN_INDEX, lambda c: b"[]", "is damaged"),
        (TOKEN_INDEX, lambda c: b"\xff", "is damaged"),
        ("tokenizer.json", lambda c: c.replace(b'"</s>"', b'"<|s>"'), "tokenizer"),
    ],
)
def test_damage_is_noticed(folder: Path, tmp_path: Path, name: str, damage: Any, says: str) -> None:
    edited(folder / name, damage)
    with pytest.raises(DataError, match=says) as caught:
        open_corpus(source_config(folder), tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_missing_shard_and_an_unfinished_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "tokens-00000-000.bin").unlink()
    with pytest.raises(DataError, match=r"000.bin' is missing, and its index says 1,000 bytes"):
        open_corpus(source_config(folder), tmp_path / "cache")
    (folder / TOKEN_INDEX).unlink()
    with pytest.raises(DataError, match="holds no finished tokens"):
        read_folder(folder)


def test_a_shard_that_cannot_be_read_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, count: object) -> str:
        raise OSError(5, "Input/output error")  # as read(2) fails: without a name

    monkeypatch.setattr(token_source, "sha256_of_file", fail)
    with pytest.raises(DataError, match=r"cannot read '.*tokens-00000-000.bin': Input/output"):
        open_corpus(source_config(folder), tmp_path / "cache")


def test_an_index_of_another_version(folder: Path) -> None:
    index = read_folder(folder)
    data = encode_folder(index)
    assert decode_folder(data, "x") == index
    values = json.loads(data)
    newer = encode_folder(index.model_copy(update={"format": "everstep tokens 9"}))
    with pytest.raises(DataError, match=r"is not of the format 'everstep tokens 1' that this vers"):
        decode_folder(newer, "x")
    outside = index.shards[0].model_copy(update={"file": "../../etc/passwd"})
    escaped = encode_folder(index.model_copy(update={"shards": (outside,)}))
    with pytest.raises(DataError, match="is not of the format"):
        decode_folder(escaped, "x")
    assert values["checksum"]


def test_npy_and_bin(tmp_path: Path) -> None:
    tokens = np.arange(1000) % 257
    np.save(tmp_path / "a.npy", tokens.astype(np.uint16))
    tokens.astype("<u4").tofile(tmp_path / "b.bin")
    npy = open_corpus(source_config(tmp_path / "a.npy", "bytes"), tmp_path / "cache")
    raw = open_corpus(
        source_config(tmp_path / "b.bin", "bytes", token_dtype="uint32"), tmp_path / "cache"
    )
    for corpus in (npy, raw):
        assert corpus.tokens_train[:].tolist() == tokens[:900].tolist()
        assert corpus.tokens_held_out[:].tolist() == tokens[900:].tolist()
        assert corpus.documents is None
    assert npy.tokens_train.dtype == np.uint16
    both = source_config(tmp_path / "*.*", "bytes", token_dtype="uint32")
    assert open_corpus(both, tmp_path / "cache").tokens_train.size == 1800
    np.save(tmp_path / "a.npy", tokens[::-1].astype(np.uint16))
    assert open_corpus(source_config(tmp_path / "a.npy", "bytes"), tmp_path / "cache").digest != (
        npy.digest
    )


def test_token_files_that_cannot_be(tmp_path: Path) -> None:
    def complaint(name: str, **fields: Any) -> str:
        with pytest.raises(DataError) as caught:
            open_corpus(source_config(tmp_path / name, "bytes", **fields), tmp_path / "cache")
        return str(caught.value)

    np.save(tmp_path / "signed.npy", np.arange(9))
    assert "holds int64 of shape (9,), expected unsigned integers in one dim" in complaint(
        "signed.npy"
    )
    np.save(tmp_path / "two.npy", np.zeros((3, 3), np.uint16))
    assert "of shape (3, 3)" in complaint("two.npy")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert "is not an array that numpy can map" in complaint("objects.npy")
    np.save(tmp_path / "large.npy", np.full(999, 300, np.uint16))
    assert "holds the token 300, and the tokenizer has 257 ids only" in complaint("large.npy")
    (tmp_path / "odd.bin").write_bytes(b"abc")
    assert "write {path: " in complaint("odd.bin")
    assert "3 bytes, which is no whole number of uint16 tokens" in complaint(
        "odd.bin", token_dtype="uint16"
    )
    (tmp_path / "empty.bin").touch()
    assert "too small" in complaint("empty.bin", token_dtype="uint16")
    np.save(tmp_path / "fine.npy", np.zeros(999, np.uint16))
    with pytest.raises(DataError, match=r"data.source has none; name a tokenizer"):
        open_corpus(source_config(tmp_path / "fine.npy"), tmp_path / "cache")
    (tmp_path / "text.txt").write_text("text")
    paths = [str(tmp_path / "fine.npy"), str(tmp_path / "text.txt")]
    with pytest.raises(DataError, match=r"mixes tokens \('.*fine.npy'\) and text \('.*text.txt'\)"):
        open_corpus(data_config(paths), tmp_path / "cache")


def test_a_mixture_of_text_and_tokens_takes_the_folders_tokenizer(
    made: Path, texts: Path, tmp_path: Path
) -> None:
    entries = [SourceConfig(path=str(made), weight=2), SourceConfig(path=str(texts))]
    config = source_config(made).model_copy(update={"source": entries})
    corpus = open_corpus(config, tmp_path / "cache")
    one, other = corpus.parts
    assert one.tokens_train.size == other.tokens_train.size
    assert corpus.tokenizer_digest == read_folder(made).tokenizer.digest
    assert corpus.entropy_nats > 2
    assert corpus.documents == 24
