"""Both tokenizers, and tokenizer.json files as people have them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from everstep.trainer.data import open_corpus, open_tokenizer
from everstep.trainer.data.pieces import Piece
from everstep.trainer.data.tokenizer import BytesTokenizer, HfTokenizer, token_dtype
from everstep.trainer.errors import DataError
from tests.support.corpora import WORDS, data_config, edited, write_texts, write_tokenizer

TEXT = "snow, grün & 東京\n\ttokens: 🙂"


def test_bytes() -> None:
    tokenizer = open_tokenizer("bytes")
    assert tokenizer.encode("aü") == [97, 0xC3, 0xBC]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.decode([104, 105, 256, 300, 33]) == "hi!"
    assert tokenizer.decode([0xC3, 33]) == "\N{REPLACEMENT CHARACTER}!"
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)


def test_bytes_end_documents() -> None:
    pieces = [Piece(b"ab", False), Piece(b"c", True), Piece(b"d", True)]
    tokens = np.concatenate(list(BytesTokenizer().tokenize(pieces)))
    assert tokens.tolist() == [97, 98, 99, 256, 100, 256]
    assert tokens.dtype == np.uint16


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, "u1"), (257, "u2"), (65536, "u2"), (65537, "u4")]
)
def test_tokens_take_the_smallest_type(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(dtype)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    pytest.importorskip("tokenizers")
    return write_tokenizer(tmp_path / "model" / "tokenizer.json")


def test_a_real_tokenizer_json(path: Path) -> None:
    tokenizer = open_tokenizer(str(path))
    ids = tokenizer.encode(TEXT)
    assert len(ids) < len(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode([*ids, tokenizer.eos_id, 10_000]) == TEXT
    assert tokenizer.vocab_size == max(json.loads(path.read_text())["model"]["vocab"].values()) + 1
    assert tokenizer.eos_id == 0


def test_truncation_padding_and_added_tokens_do_not_reach_the_corpus(path: Path) -> None:
    from tokenizers import Tokenizer, processors

    expected = open_tokenizer(str(path)).encode(TEXT * 10)
    library = Tokenizer.from_file(str(path))
    library.enable_truncation(5)
    library.enable_padding(length=7)
    library.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    library.save(str(path))
    tokenizer = open_tokenizer(str(path))
    assert tokenizer.encode(TEXT * 10) == expected
    (tokens,) = tokenizer.tokenize([Piece((TEXT * 10).encode(), False)])
    assert tokens.tolist() == expected


def test_a_corpus_of_bpe_tokens(path: Path, tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts", count=30)
    config = data_config(folder, tokenizer=str(path), held_out=0.2)
    corpus = open_corpus(config, tmp_path / "cache")
    tokens = np.concatenate([corpus.tokens_train, corpus.tokens_held_out])
    documents = [p.read_text(encoding="utf-8") for p in folder.iterdir()]
    ends = np.flatnonzero(tokens == 0)
    assert ends.size == 30
    assert ends[-1] == tokens.size - 1
    parts = [part[:-1].tolist() for part in np.split(tokens, ends[:-1] + 1)]
    assert sorted(map(corpus.decode, parts)) == sorted(documents), "0 ends each part but the last"
    assert parts[3] == corpus.encode(corpus.decode(parts[3]))
    assert corpus.tokens_held_out.size == int(tokens.size * 0.2)
    assert corpus.tokens_train.dtype == np.uint16


def test_another_tokenizer_is_another_corpus(path: Path, tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts", count=30)
    config = data_config(folder, tokenizer=str(path))
    first = open_corpus(config, tmp_path / "cache")
    write_tokenizer(path, vocab_size=280)
    second = open_corpus(config, tmp_path / "cache")
    assert first.text_digest == second.text_digest
    assert first.tokenizer_digest != second.tokenizer_digest
    assert first.digest != second.digest
    assert second.vocab_size == 280


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("declared", ["<|im_end|>", {"content": "<|im_end|>", "lstrip": False}])
def test_eos_as_declared_beside_the_file(tmp_path: Path, name: str, declared: object) -> None:
    pytest.importorskip("tokenizers")
    path = write_tokenizer(tmp_path / "t.json", ("<|endoftext|>", "</s>", "<|im_end|>"))
    path.with_name(name).write_text(json.dumps({"eos_token": declared}))
    assert open_tokenizer(str(path)).eos_id == 2


def test_eos_by_its_usual_name(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    path = write_tokenizer(tmp_path / "t.json", ("<unk>", "</s>"))
    path.with_name("tokenizer_config.json").write_text("{}")
    assert open_tokenizer(str(path)).eos_id == 1


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (("<unk>",), r"has none of the usual ones; put a tokenizer_config.json with {\"eos_token"),
        (("</s>", "<|endoftext|>"), r"has several usual ones \(<\|endoftext\|>, </s>\); put"),
    ],
)
def test_eos_that_cannot_be_told(tmp_path: Path, tokens: tuple[str, ...], says: str) -> None:
    pytest.importorskip("tokenizers")
    path = write_tokenizer(tmp_path / "t.json", tokens)
    with pytest.raises(DataError, match=says):
        open_tokenizer(str(path))


def test_eos_declared_wrongly(path: Path) -> None:
    beside = path.with_name("tokenizer_config.json")
    beside.write_text('{"eos_token": "<|oes|>"}')
    with pytest.raises(DataError, match=r"names '<\|oes\|>' as eos_token, which the vocabulary"):
        open_tokenizer(str(path))
    beside.write_text('{"eos_token": ')
    with pytest.raises(DataError, match=r"cannot read .*tokenizer_config\.json"):
        open_tokenizer(str(path))


def test_mistakes_in_data_tokenizer(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"no file 'gpt2' \(looked in /.*\); it is 'bytes' or"):
        open_tokenizer("gpt2")
    with pytest.raises(DataError, match=r"is a folder; give the file in it, '.*/tokenizer.json'"):
        open_tokenizer(str(path.parent))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"pip install 'everstep\[hf\]'"):
        open_tokenizer(str(path))


def test_a_file_that_is_no_tokenizer(path: Path) -> None:
    edited(path, lambda contents: contents[:-20])
    with pytest.raises(DataError, match=r"is not a tokenizer.json of the tokenizers library"):
        open_tokenizer(str(path))


def test_many_pieces_keep_their_order(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everstep.trainer.data.tokenizer._BATCH_BYTES", 50)
    tokenizer = HfTokenizer(path)
    pieces = [Piece(f"{i} {WORDS[i % 7]}".encode(), i % 3 == 0) for i in range(40)]
    expected: list[int] = []
    for piece in pieces:
        expected += tokenizer.encode(piece.text.decode()) + [0] * piece.ends_document
    assert np.concatenate(list(tokenizer.tokenize(pieces))).tolist() == expected
