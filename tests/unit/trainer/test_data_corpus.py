"""Packing, order, split and digest of a corpus, against a slow reference."""

import hashlib
import math
import random
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from everstep.trainer.data import TrainStream, check_held_out_fits, documents, open_corpus, pieces
from everstep.trainer.data.sources import find_files
from everstep.trainer.errors import DataError
from tests.support.corpora import data_config, edited, write_texts


def slow_tokens(folder: Path) -> list[int]:
    """Bytes of all documents in the order of their keyed hash, 256 after each."""
    contents = [path.read_bytes() for path in folder.rglob("*.txt")]
    contents.sort(key=lambda c: hashlib.sha256(b"everstep document order 1\0" + c).hexdigest())
    return [token for content in contents for token in [*content, 256]]


def test_packing_order_and_split(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    corpus = open_corpus(data_config(folder, held_out=0.15), tmp_path / "cache")
    expected = slow_tokens(folder)
    assert [*corpus.tokens_train.tolist(), *corpus.tokens_held_out.tolist()] == expected
    assert corpus.tokens_held_out.size == int(0.15 * len(expected))
    assert corpus.tokens_train.dtype == np.uint16
    assert not corpus.tokens_train.flags.writeable
    assert corpus.documents == 12
    assert corpus.text_bytes == len(expected) - 12
    assert corpus.name == str(folder)
    assert corpus.vocab_size == 257
    assert corpus.decode(corpus.encode("grün")) == "grün"


@pytest.mark.parametrize("piece_bytes", [1, 2, 7, 64])
def test_long_documents_are_cut_between_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    folder = write_texts(tmp_path / "texts", count=4)
    (folder / "wide.txt").write_text("東京" * 50, encoding="utf-8")
    expected = slow_tokens(folder)
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
    corpus = open_corpus(data_config(folder, held_out=0.0), tmp_path / "cache")
    assert corpus.tokens_train.tolist() == expected


def test_pieces_end_at_line_ends_where_there_are_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes(b"one\ntwo\nthree\n" + "ü".encode() * 20 + b"\nend\n")
    monkeypatch.setattr(pieces, "PIECE_BYTES", 10)
    hasher = hashlib.sha256(b"everstep document order 1\0" + path.read_bytes())
    document = documents.Document(str(path), path.stat().st_size, hasher.hexdigest())
    tally = pieces.Tally()
    sources = find_files(str(path))
    found = list(
        documents.read_pieces(sources, [document], lambda size_bytes, was_read: None, tally)
    )
    assert b"".join(piece.text for piece in found) == path.read_bytes()
    assert [piece.ends_document for piece in found] == [False] * (len(found) - 1) + [True]
    assert found[0].text == b"one\ntwo\nthree\n"
    assert all(piece.text.decode() for piece in found)
    assert max(len(piece.text) for piece in found) <= 20


def test_the_digest_is_about_contents_not_names(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    first = open_corpus(data_config(folder), tmp_path / "cache")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        target = elsewhere / f"{number % 3}" / f"{97 * (number + 1) % 50}.md"
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    second = open_corpus(data_config(elsewhere), tmp_path / "cache")
    assert second.digest == first.digest
    assert len(list((tmp_path / "cache").glob("tokens-*.bin"))) == 1, "found, not built again"
    np.testing.assert_array_equal(second.tokens_train, first.tokens_train)


def test_the_digest_covers_content_and_split(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    config = data_config(folder)
    digests = [open_corpus(config, tmp_path / "cache").digest]
    digests.append(open_corpus(data_config(folder, held_out=0.2), tmp_path / "cache").digest)
    edited(folder / "003.txt", lambda content: content + b".")
    digests.append(open_corpus(config, tmp_path / "cache").digest)
    (folder / "003.txt").unlink()
    digests.append(open_corpus(config, tmp_path / "cache").digest)
    edited(folder / "004.txt", lambda content: content + (folder / "005.txt").read_bytes())
    (folder / "005.txt").unlink()
    digests.append(open_corpus(config, tmp_path / "cache").digest)
    assert len(set(digests)) == 5


def test_equal_documents_all_count(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts", count=2)
    (folder / "copy.txt").write_bytes((folder / "000.txt").read_bytes())
    corpus = open_corpus(data_config(folder, held_out=0.0), tmp_path / "cache")
    assert corpus.documents == 3
    assert corpus.tokens_train.tolist() == slow_tokens(folder)


def test_one_document_is_enough_for_a_split(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("once upon a time " * 100)
    corpus = open_corpus(data_config(tmp_path / "book.txt", held_out=0.25), tmp_path / "cache")
    assert corpus.tokens_train.size == 1701 - 425
    assert corpus.tokens_held_out.size == 425


def test_entropy_is_that_of_the_training_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("everstep.trainer.data.corpus._COUNT_AT_ONCE", 100)
    folder = write_texts(tmp_path / "texts")
    corpus = open_corpus(data_config(folder, held_out=0.3), tmp_path / "cache")
    counts = Counter(corpus.tokens_train.tolist())
    total = sum(counts.values())
    expected = -sum(c / total * math.log(c / total) for c in counts.values())
    assert corpus.entropy_nats == pytest.approx(expected, rel=1e-12)
    assert 2 < corpus.entropy_nats < 4


def test_the_standard_library_is_a_corpus(tmp_path: Path) -> None:
    config = data_config("stdlib", seq_len=256, global_batch=16, held_out=0.02)
    corpus = open_corpus(config, tmp_path)
    check_held_out_fits(corpus, config)
    assert corpus.documents > 300
    assert corpus.tokens_train.size > 3_000_000
    assert 2.5 < corpus.entropy_nats < 4
    batch = TrainStream(corpus, config, 0, 0, 1).next_step()[0]
    assert len(corpus.decode(batch.tokens_BL[0].tolist())) > 100


def test_another_python_is_noticed_at_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def corpus_of(version: str) -> TrainStream:
        library = tmp_path / version
        monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})
        monkeypatch.setattr("platform.python_version", lambda: version)
        corpus = open_corpus(data_config("stdlib"), tmp_path / "cache")
        return TrainStream(corpus, data_config("stdlib"), 0, 0, 1)

    for version in ("3.11.7", "3.12.1"):
        write_texts(tmp_path / version, count=5)
        for path in (tmp_path / version).iterdir():
            path.rename(path.with_suffix(".py"))
    with (tmp_path / "3.12.1" / "000.py").open("a") as file:
        file.write("# new\n")
    state = corpus_of("3.11.7").state_dict()
    corpus_of("3.11.7").load_state_dict(state)
    with pytest.raises(
        DataError,
        match=r"Python 3\.11\.7 standard library then \(digest \w{12}\), Python 3\.12\.1 .* now .*"
        r"restore the original text .*, or train in a new run directory$",
    ):
        corpus_of("3.12.1").load_state_dict(state)


def test_progress_ends_at_the_total_and_is_silent_when_nothing_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("everstep.trainer.data.stamps.YOUNG_NS", 0)
    folder = write_texts(tmp_path / "texts", seed=random.randrange(2**32))
    calls: list[tuple[int, int]] = []
    open_corpus(data_config(folder), tmp_path / "cache", progress=lambda *c: calls.append(c))
    size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    assert {total for _, total in calls} == {2 * size_bytes}
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (2 * size_bytes, 2 * size_bytes)
    calls.clear()
    open_corpus(data_config(folder), tmp_path / "cache", progress=lambda *c: calls.append(c))
    assert calls == []
