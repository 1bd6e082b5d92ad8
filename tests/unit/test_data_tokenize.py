"""``everstep data tokenize``: the same bytes with any number of workers, however often killed."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from everstep.data_tokenize import tokenize
from everstep.trainer.config import SourceConfig
from everstep.trainer.data.sources import FileFormat
from everstep.trainer.data.stamps import FileStamp
from everstep.trainer.data.token_folder import open_shards, read_folder
from everstep.trainer.data.tokenize_plan import Unit, plan_parts
from everstep.trainer.errors import DataError
from everstep.words import parse_count
from tests.support import cli
from tests.support.cli import exit_code as run
from tests.support.corpora import WORDS, write_texts, write_tokenizer

SHARD_TOKENS = 20_000


def texts_of(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 60))) for _ in range(count)]


def write_lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all formats, some of them cut into several parts; old enough to be trusted."""
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("source") / "data"
    write_texts(folder, count=5)
    write_lines(folder / "large.jsonl", texts_of(1, 10_000))
    write_lines(folder / "small.jsonl", texts_of(2, 20))
    parquet.write_table(
        pa.table({"text": texts_of(3, 3000)}), folder / "web.parquet", row_group_size=200
    )
    deadline = time.monotonic() + 30
    while not all(FileStamp.of(path).settled(time.time_ns()) for path in folder.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return folder


def make(source: object, output: Path, **fields: Any) -> str:
    """Tokenizes in this process and its workers; what it printed."""
    workers = fields.pop("workers", 1)
    tokenizer = fields.pop("tokenizer", "bytes")
    paths = [str(path) for path in source] if isinstance(source, list) else [str(source)]
    printed = output.with_name(f"{output.name}.txt")
    with printed.open("w") as file:
        tokenize(
            SourceConfig(path=paths, **fields),
            str(tokenizer),
            output,
            workers=workers,
            shard_tokens=SHARD_TOKENS,
            console=Console(file=file, width=200),
        )
    return printed.read_text()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokens of ``source``, made without a break. Not to be changed."""
    output = tmp_path_factory.mktemp("expected") / "tokens"
    make(source, output, workers=3)
    return output


@pytest.fixture(scope="module")
def expected(made: Path) -> dict[str, bytes]:
    return contents(made)


def test_it_holds_every_document_once_in_order(source: Path, made: Path) -> None:
    index = read_folder(made)
    tokens = np.concatenate(open_shards(made, index))
    texts = [(source / f"{i:03d}.txt").read_text(encoding="utf-8") for i in range(5)]
    texts += [*texts_of(1, 10_000), *texts_of(2, 20), *texts_of(3, 3000)]
    assert tokens.tolist() == [t for text in texts for t in [*text.encode(), 256]]
    assert index.documents == len(texts)
    assert index.text_bytes == sum(len(text.encode()) for text in texts)
    assert index.tokens == tokens.size
    assert all(shard.tokens <= SHARD_TOKENS for shard in index.shards)
    assert tokens.dtype == np.uint16


def test_the_number_of_workers_does_not_matter(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    make(source, tmp_path / "tokens")
    assert contents(tmp_path / "tokens") == expected
    assert set(expected) == {"everstep_tokens.json", *(n for n in expected if n.endswith(".bin"))}


def kill_and_resume(source: Path, folder: Path, seed: int) -> dict[str, bytes]:
    """Killed some times after a random number of parts, then to its end."""
    rng = random.Random(seed)
    output = folder / "tokens"
    notes = output / "unfinished"
    for workers in (2, 1):
        wanted = len(list(notes.glob("part-?????"))) + rng.randint(0, 8)
        with cli.command(*arguments(source, workers), cwd=folder) as started:
            assert cli.wait_until(
                lambda wanted=wanted, started=started: (  # type: ignore[misc]
                    started.process.poll() is not None
                    or len(list(notes.glob("part-?????"))) >= wanted
                )
            )
            started.process.kill()
            started.process.wait()
            started.assert_nothing_left()  # the workers end by themselves
    code, output_text = cli.run(*arguments(source, 2), cwd=folder)
    assert code == 0, output_text
    return contents(output)


def arguments(source: Path, workers: int) -> list[str]:
    fixed = ["--tokenizer", "bytes", "--output", "tokens", "--shard-tokens", str(SHARD_TOKENS)]
    return ["data", "tokenize", str(source), *fixed, "--workers", str(workers)]


def test_killed_at_any_moment_it_makes_the_same_bytes(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    assert kill_and_resume(source, tmp_path, seed=100) == expected


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_killed_at_many_moments_it_makes_the_same_bytes(
    source: Path, expected: dict[str, bytes], tmp_path: Path, seed: int
) -> None:
    assert kill_and_resume(source, tmp_path, seed) == expected


def test_ctrl_c_stops_and_the_same_command_goes_on(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    notes = tmp_path / "tokens" / "unfinished"
    with cli.command(*arguments(source, 1), cwd=tmp_path) as started:
        assert cli.wait_until(lambda: len(list(notes.glob("part-?????"))) >= 2)
        started.interrupt()
        assert started.wait() == 75, started.output
        started.assert_nothing_left()
        assert "the same command goes on from here" in started.output
        assert "Traceback" not in started.output
    (damaged, *_) = sorted((tmp_path / "tokens").glob("tokens-*.bin"))
    damaged.write_bytes(damaged.read_bytes()[:-2])
    (tmp_path / "tokens" / "tokens-00000-000.bin.part.0.tmp").touch()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").glob("tokens-*.bin")}
    code, output = cli.run(*arguments(source, 2), cwd=tmp_path)
    assert code == 0, output
    assert "parts are done already" in output
    assert contents(tmp_path / "tokens") == expected
    unchanged = [path for path, mtime_ns in kept.items() if path.stat().st_mtime_ns == mtime_ns]
    assert unchanged, "what was done is not done again"
    assert damaged not in unchanged


def test_a_worker_that_dies_is_an_error_and_not_a_hang(source: Path, tmp_path: Path) -> None:
    def workers(started: cli.Command) -> list[int]:
        found = []
        for pid in started.alive():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    with cli.command(*arguments(source, 2), cwd=tmp_path) as started:
        assert cli.wait_until(lambda: len(workers(started)) > 0)
        os.kill(workers(started)[0], signal.SIGKILL)
        assert started.wait() == 1, started.output
        started.assert_nothing_left()
    assert "error: a tokenizing process died (exit code -9;" in started.output


def test_a_second_one_at_once_is_refused(source: Path, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "tokens" / "unfinished").mkdir(parents=True)
    with (tmp_path / "tokens" / "unfinished" / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"another everstep data tokenize is writing to '.*tok"):
            make(source, tmp_path / "tokens")


def test_what_is_complete_is_left_alone(source: Path, tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    make(folder, tmp_path / "tokens")
    before = contents(tmp_path / "tokens")
    assert "is complete already, nothing to do" in make(folder, tmp_path / "tokens")
    with pytest.raises(DataError, match=r"made with sources \('.*texts',\); choose"):
        make(source, tmp_path / "tokens")
    tokenizer = write_tokenizer(tmp_path / "t.json")
    with pytest.raises(DataError, match="is complete already, made with another tokenizer"):
        make(folder, tmp_path / "tokens", tokenizer=tokenizer)
    assert contents(tmp_path / "tokens") == before


def test_other_peoples_folders_are_left_alone(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "tokens-00000-000.bin").write_text("precious")
    with pytest.raises(DataError, match="is not empty and holds no unfinished tokens"):
        make(folder, tmp_path / "mine")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot write to '.*file': "):
        make(folder, tmp_path / "file")
    make(folder, tmp_path / "tokens")
    with pytest.raises(DataError, match=r"holds tokens already: use it as data\.source"):
        make(tmp_path / "tokens", tmp_path / "again")


def test_bad_rows_stop_it_or_are_counted(tmp_path: Path) -> None:
    write_lines(tmp_path / "web.jsonl", texts_of(1, 30))
    with (tmp_path / "web.jsonl").open("a") as file:
        file.write('{"no": "text"}\n')
    with pytest.raises(DataError, match=r"web.jsonl', line 31: the row has no field 'text'"):
        make(tmp_path / "web.jsonl", tmp_path / "tokens")
    printed = make(tmp_path / "web.jsonl", tmp_path / "tokens", on_bad_rows="skip")
    assert "1 skipped" in printed
    assert "line 31: the row has no field 'text'" in printed
    assert read_folder(tmp_path / "tokens").bad_rows == 1


def test_files_that_are_not_text(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts", count=3)
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    printed = make(folder, tmp_path / "tokens")
    assert "1 files are not UTF-8 text and were left out, such as" in printed
    assert read_folder(tmp_path / "tokens").documents == 3
    with pytest.raises(DataError, match=r"picture.png' is not UTF-8 text \(invalid at byte 0\)"):
        make(folder / "picture.png", tmp_path / "other")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"no text in .*empty\.txt"):
        make(tmp_path / "empty.txt", tmp_path / "another")


def test_a_tokenizer_json_goes_along(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    folder = write_texts(tmp_path / "texts")
    tokenizer = write_tokenizer(tmp_path / "t.json", ("<unk>", "<|endoftext|>", "</s>"))
    declared = tmp_path / "tokenizer_config.json"
    declared.write_text('{"eos_token": "</s>", "chat_template": "not ours"}')
    make(folder, tmp_path / "tokens", tokenizer=tokenizer)
    assert read_folder(tmp_path / "tokens").tokenizer.eos_id == 2
    copies = {p.name for p in (tmp_path / "tokens").iterdir() if p.name.startswith("tokenizer")}
    assert copies == {"tokenizer.json", "tokenizer_config.json"}
    copied = json.loads((tmp_path / "tokens" / "tokenizer_config.json").read_text())
    assert copied == {"eos_token": "</s>"}


def test_a_hugging_face_dataset_is_cut_by_rows(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    texts = texts_of(5, 4000)
    datasets.Dataset.from_dict({"text": texts[::-1]}).select(range(3999, -1, -1)).save_to_disk(
        str(tmp_path / "hf")
    )
    make(tmp_path / "hf", tmp_path / "tokens")
    index = read_folder(tmp_path / "tokens")
    tokens = np.concatenate(open_shards(tmp_path / "tokens", index))
    assert tokens.tolist() == [t for text in texts for t in [*text.encode(), 256]]
    assert {shard.file[:12] for shard in index.shards} >= {"tokens-00000", "tokens-00001"}


@given(
    sizes=st.lists(st.integers(0, 10**5), max_size=12),
    kinds=st.lists(st.sampled_from(["text", "jsonl", "parquet"]), min_size=12, max_size=12),
    shard_tokens=st.integers(500, 10**6),
)
def test_parts_cover_everything_once(
    sizes: list[int], kinds: list[FileFormat], shard_tokens: int
) -> None:
    units = [
        Unit(
            path=str(number),
            format=kind,
            named=True,
            size_bytes=size,
            stamps=(),
            trusted=True,
            any_byte=kind == "jsonl",
            cuts=tuple((i, size * i // 7) for i in range(8)) if kind == "parquet" else (),
        )
        for number, (size, kind) in enumerate(zip(sizes, kinds, strict=False))
    ]
    parts = plan_parts(units, shard_tokens)
    assert [part.number for part in parts] == list(range(len(parts)))
    spans = [span for part in parts for span in part.spans]
    assert sum(span.size_bytes for span in spans) == sum(sizes)
    for unit in units:
        own = [span for span in spans if span.path == unit.path]
        assert own
        ends = [0, *(span.stop for span in own)]
        if ends[-1] is None:
            assert len(own) == 1
        else:
            assert [span.start for span in own] == ends[:-1]
            assert ends[-1] == (unit.size_bytes if unit.any_byte else 7)
    assert [span.path for span in spans] == sorted((s.path for s in spans), key=int)


def test_inspect(
    made: Path, expected: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "tokens"
    copy.mkdir()
    for name, content in expected.items():
        (copy / name).write_bytes(content)
    assert run("data", "inspect", made) == 0
    shown = capsys.readouterr().out
    assert "documents  13,025" in shown
    assert "verified" not in shown
    assert run("data", "inspect", made, "--verify", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["documents"] == 13025
    assert found["verified"] is True
    assert found["tokens"] == read_folder(made).tokens
    shard = copy / found["shards"][3]["file"]
    shard.write_bytes(bytes(shard.stat().st_size))
    assert run("data", "inspect", copy) == 0
    assert run("data", "inspect", copy, "--verify") == 1
    assert f"error: the shard '{shard}' is damaged" in capsys.readouterr().err
    assert run("data", "inspect", tmp_path) == 1
    assert "holds no finished tokens" in capsys.readouterr().err


def test_verifying_is_told_where_there_is_no_terminal(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("everstep.data_view._LINE_EVERY_S", -1.0)
    assert run("data", "inspect", made, "--verify") == 0
    told = capsys.readouterr().err
    assert "verifying: 100 %" in told
    assert "tokenizing" not in told


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--shard-tokens", "many"],
            "--shard-tokens: got 'many', expected at least 1000, such",
        ),
        (["--format", "csv"], "--format: got 'csv': input should be 'auto', 'text', 'jsonl'"),
        (["--format", "tokens"], "--format: got 'tokens', which need no tokenizing"),
        (["--on-bad-rows", "fix"], "--on-bad-rows: got 'fix': input should be 'error' or 'skip'"),
        (["--storage-option", "x"], "--storage-option: got 'x', expected KEY=VALUE"),
        (["--storage-option", "x=[a"], "--storage-option: the value of x is not valid YAML"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ["data", "tokenize", "stdlib", "--tokenizer", "bytes", "--output", str(tmp_path / "t")]
    assert run(*fixed, *arguments) == 2
    assert f"error: {says}" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_neither_torch_nor_ray_is_imported() -> None:
    program = (
        "import everstep.data_tokenize, everstep.data_view, everstep.cli_data, sys; "
        "print([name for name in ('torch', 'ray', 'pyarrow', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("text", "count"),
    [("100M", 10**8), ("1.5k", 1500), ("7", 7), ("2 B", 2 * 10**9), ("", None), ("1e6", None)],
)
def test_counts(text: str, count: int | None) -> None:
    assert parse_count(text) == count
