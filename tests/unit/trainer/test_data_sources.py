"""What ``data.source`` finds, and what a new user gets wrong."""

import os
import sysconfig
from pathlib import Path

import pytest

from everstep.trainer.data import documents, open_corpus
from everstep.trainer.data.sources import find_files
from everstep.trainer.data.storage import Storage
from everstep.trainer.errors import DataError
from tests.support.corpora import data_config, write_texts


def names(source: str | list[str]) -> list[str]:
    return [os.path.basename(file.path) for file in find_files(source).files]


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with books/{a.txt,b.md,deep/c.txt} and hidden things."""
    for name in ("a.txt", "b.md", "deep/c.txt", ".hidden.txt", ".git/config"):
        path = tmp_path / "books" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"This is {name}.\n" * 20)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_files_folders_globs(texts: Path) -> None:
    assert names("books") == ["a.txt", "b.md", "c.txt"]
    assert names("books/*.txt") == ["a.txt"]
    assert names("books/**/*.txt") == ["a.txt", "c.txt"]
    assert names(str(texts / "books" / "b.md")) == ["b.md"]
    assert names(["books/b.md", "books/deep"]) == ["b.md", "c.txt"]


def test_the_runs_own_files_are_no_text(texts: Path) -> None:
    deep = texts / "books" / "deep"
    found = [file.path for file in find_files("books", leave_out=deep).files]
    assert sorted(map(os.path.basename, found)) == ["a.txt", "b.md"]
    named = find_files(["books", "books/deep/c.txt"], leave_out=deep).files
    assert [os.path.basename(file.path) for file in named] == ["a.txt", "b.md", "c.txt"]


def test_a_file_found_twice_is_read_once(texts: Path) -> None:
    (texts / "link.txt").symlink_to(texts / "books" / "a.txt")
    found = find_files(["books/*.txt", "books/a.txt", "books", "link.txt"])
    assert [os.path.basename(file.path) for file in found.files] == ["a.txt", "b.md", "c.txt"]
    assert [file.named for file in found.files] == [True, False, False]


def test_a_name_that_exists_is_not_a_glob(texts: Path) -> None:
    (texts / "part[1].txt").write_text("brackets")
    assert names("part[1].txt") == ["part[1].txt"]


def test_the_key_does_not_depend_on_the_working_directory(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relative = find_files("books/*.txt").key
    absolute = find_files(str(texts / "books" / "*.txt")).key
    monkeypatch.chdir(texts / "books")
    assert find_files("*.txt").key == relative == absolute != find_files("deep").key


def test_links_to_folders_are_not_followed(texts: Path) -> None:
    (texts / "books" / "deep" / "up").symlink_to(texts / "books")
    assert names("books") == ["a.txt", "b.md", "c.txt"]


def test_the_standard_library() -> None:
    found = find_files("stdlib")
    assert found.name.startswith("Python 3.")
    paths = [file.path for file in found.files]
    assert "json/decoder.py" in {"/".join(path.split(os.sep)[-2:]) for path in paths}
    top = os.path.realpath(sysconfig.get_paths()["stdlib"])
    folders = {part for path in paths for part in os.path.relpath(path, top).split(os.sep)[:-1]}
    assert not folders & {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    assert all(path.endswith(".py") for path in paths)


def test_a_python_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match=r"stripped or zipped installation\); name text files"):
        find_files("stdlib")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("boks", r"there is no file or folder 'boks' \(looked in /.*\); name text files"),
        ("books/*.rst", r"no file matches 'books/\*.rst' \(looked in /"),
        (["books/a.txt", "nope.txt"], "there is no file or folder 'nope.txt'"),
        ([], "data.source is an empty list"),
        ("empty", "the folder 'empty' holds no files"),
        ("/dev/null", "'/dev/null' is not a regular file"),
        ("pictures", r"no text in pictures \(2 files found, 1 of them .*not UTF-8, the others em"),
        ("pictures/x.png", r"x.png' is not UTF-8 text \(invalid at byte 0\); convert it"),
        ("nul.txt", r"nul.txt' is not UTF-8 text \(a zero byte at byte 3\)"),
        ("latin.txt", r"latin.txt' is not UTF-8 text \(invalid at byte 3\)"),
        ("blank.txt", "no text in blank.txt .1 files found, 0 of them"),
        ("tiny.txt", r"too small: tiny.txt has 4 tokens to train on, .* \+ 1 = 33; add text"),
    ],
)
def test_mistakes_get_one_sentence(source: str | list[str], says: str, texts: Path) -> None:
    (texts / "empty").mkdir()
    (texts / "pictures").mkdir()
    (texts / "pictures" / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0")
    (texts / "pictures" / "empty.txt").touch()
    (texts / "nul.txt").write_bytes(b"abc\0def")
    (texts / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (texts / "blank.txt").touch()
    (texts / "tiny.txt").write_bytes(b"abc")
    with pytest.raises(DataError, match=says) as caught:
        open_corpus(data_config(source), texts / "cache")
    assert "\n" not in str(caught.value)


def test_files_that_are_not_text_are_left_out_of_folders_and_reported(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    plain = open_corpus(data_config(folder), tmp_path / "cache")
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    (folder / "cut.txt").write_bytes("grün".encode()[:3])
    (folder / "empty.txt").touch()
    with_others = open_corpus(data_config(folder), tmp_path / "cache")
    assert plain.skipped == ()
    assert [os.path.basename(path) for path in with_others.skipped] == ["cut.txt", "picture.png"]
    assert with_others.digest == plain.digest
    assert with_others.documents == plain.documents == 12


def test_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_texts(tmp_path / "texts")
    secret = folder / "000.txt"
    really_hash = documents.hash_file

    def refuse(path: str, storage: Storage, must_be_text: bool) -> tuple[str, int]:
        if path == str(secret):  # root may read a file of any mode
            raise PermissionError(13, "Permission denied", path)
        return really_hash(path, storage, must_be_text)

    monkeypatch.setattr(documents, "hash_file", refuse)
    assert open_corpus(data_config(folder), tmp_path / "cache").skipped == (str(secret),)
    with pytest.raises(DataError, match=r"000\.txt': Permission denied; make it readable"):
        open_corpus(data_config(secret), tmp_path / "cache")


def test_a_link_to_nothing_in_a_folder_is_no_file(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts", count=3)
    (folder / "gone.txt").symlink_to(folder / "nothing")
    assert names(str(folder)) == ["000.txt", "001.txt", "002.txt"]
