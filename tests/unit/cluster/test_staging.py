"""Which files of a folder go along with a job, and the archive of them."""

import zipfile
from pathlib import Path

import pytest

from everstep.cluster.job_errors import StagingError
from everstep.cluster.staging import (
    LEFT_OUT,
    StagedFile,
    check_size,
    is_left_out,
    staged_files,
    write_archive,
)


def touch(folder: Path, *names: str, size: int = 3) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)


def names(folder: Path, *exclude: str, never: Path | None = None) -> list[str]:
    return [file.name for file in staged_files(folder, exclude, never)]


@pytest.mark.parametrize(
    ("name", "patterns", "expected"),
    [
        ("a/__pycache__", LEFT_OUT, True),
        ("a/b.pyc", LEFT_OUT, True),
        (".git", LEFT_OUT, True),
        ("a/.env", LEFT_OUT, True),
        ("runs", LEFT_OUT, True),
        ("package/runs", LEFT_OUT, False),
        ("a.py", LEFT_OUT, False),
        ("data", ["data/"], True),
        ("a/data", ["data"], True),
        ("a/data", ["/data"], False),
        ("a/data", ["a/data"], True),
        ("a/big.bin", ["a/*.bin"], True),
        ("b/big.bin", ["a/*.bin"], False),
    ],
)
def test_patterns(name: str, patterns: list[str], expected: bool) -> None:
    assert is_left_out(name, patterns) is expected


def test_code_goes_along_and_the_rest_stays(tmp_path: Path) -> None:
    touch(tmp_path, "train.yaml", "pkg/__init__.py", "pkg/model.py", "text/a.txt")
    touch(tmp_path, ".git/HEAD", ".env", "pkg/__pycache__/model.pyc", "runs/a/metrics.jsonl")
    touch(tmp_path, "env/pyvenv.cfg", "env/lib/x.py", "notes.md", "big/one.bin")
    (tmp_path / ".everstepignore").write_text("# not code\nnotes.md\n\n")
    kept = ["pkg/__init__.py", "pkg/model.py", "text/a.txt", "train.yaml"]
    assert names(tmp_path, "big") == kept


def test_a_run_directory_in_the_folder_stays(tmp_path: Path) -> None:
    touch(tmp_path, "a.py", "out/config.yaml")
    assert names(tmp_path, never=tmp_path / "out") == ["a.py"]


def test_links_are_followed_but_not_round_and_round(tmp_path: Path) -> None:
    touch(tmp_path, "shared/lib/x.py", "project/a.py")
    project = tmp_path / "project"
    (project / "lib").symlink_to(tmp_path / "shared" / "lib")
    (project / "self").symlink_to(project)
    (project / "gone").symlink_to(tmp_path / "nowhere")
    assert names(project) == ["a.py", "lib/x.py"]


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(StagingError, match="is no folder"):
        staged_files(tmp_path / "absent")


def staged(name: str, size_bytes: int) -> StagedFile:
    return StagedFile(name=name, path=Path(name), size_bytes=size_bytes)


def test_too_large_names_what_is_largest() -> None:
    files = [staged("a.py", 10), staged("data/x", 300), staged("data/y", 300), staged("w.pt", 500)]
    check_size(files, Path("here"), limit_bytes=1110)
    with pytest.raises(StagingError, match=r"largest: data/ \(600 B\), w.pt \(500 B\)") as caught:
        check_size(files, Path("here"), limit_bytes=1109)
    assert "--exclude" in str(caught.value)
    with pytest.raises(StagingError, match=r"more than 3 files .* data/ \(2 files\)"):
        check_size(files, Path("here"), most_files=3)


def test_archive_holds_the_files_and_is_the_same_for_the_same_contents(tmp_path: Path) -> None:
    touch(tmp_path / "p", "b.py", "pkg/a.py")
    (tmp_path / "p/b.py").chmod(0o755)
    first, second = tmp_path / "1.zip", tmp_path / "2.zip"
    for target in (first, second):
        write_archive(target, staged_files(tmp_path / "p"), {".everstep/config.yaml": "name: x\n"})
        (tmp_path / "p/b.py").touch()
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        assert archive.namelist() == ["b.py", "pkg/a.py", ".everstep/config.yaml"]
        assert archive.read(".everstep/config.yaml") == b"name: x\n"
        assert archive.getinfo("b.py").external_attr >> 16 & 0o777 == 0o755


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(StagingError, match=r"gone.py cannot be read .* --exclude gone.py"):
        write_archive(tmp_path / "x.zip", [staged("gone.py", 1)], {})
