"""Ranks that fail under the local launcher: what a person is told, and that nothing is left."""

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from everstep.cluster.rendezvous import listen
from everstep.cluster.run import run_local
from everstep.cluster.run_dir import prepare_run_dir
from everstep.trainer.config import (
    CheckpointConfig,
    LaunchConfig,
    MeshConfig,
    RunConfig,
    TrainConfig,
)
from tests.support.launched import wait_for


@dataclass(frozen=True)
class Ran:
    code: int
    output: str
    errors: str


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def run(worker: str, run_dir: Path, ranks: int = 2, **sections: object) -> Ran:
    """Run fake workers to their end, launched by this process."""
    output, errors = io.StringIO(), io.StringIO()
    known = {"train": TrainConfig(steps=20), "checkpoint": CheckpointConfig(memory=None)}
    config = RunConfig.model_validate({"name": "fake", **known, **sections})
    code = run_local(
        config,
        run_dir,
        "auto",
        ranks,
        Console(file=output, width=100),
        error_console=Console(file=errors, width=100),
        target=f"tests.support.fake_workers:{worker}",
        preload=[],
        store="launch" in sections,
    )
    return Ran(code, output.getvalue(), errors.getvalue())


def assert_nothing_left(run_dir: Path) -> None:
    """Ranks are gone and another run can begin."""
    for line in (run_dir / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["kind"] == "started":
            wait_for(lambda pid=event["pid"]: not Path(f"/proc/{pid}").exists(), "end of a rank")
    prepare_run_dir(run_dir, "").lock.release()


ALIKE = r"error: (all ranks|rank \d)"  # on a busy machine one is killed before it could fail


@pytest.mark.parametrize(
    ("worker", "code", "sentence"),
    [
        ("rank_1_raises", 1, r"error: rank 1 failed with ValueError: boom\n       full trace: "),
        ("all_raise", 1, r"error: no file matches texts/\*\.txt: give data\.source files that ex"),
        ("config_error", 2, r"error: model\.factory='x:y' cannot be imported"),
        ("exit_3", 1, rf"{ALIKE} ended with exit code 3 without saying why\n"),
        ("call_sys_exit", 1, rf"{ALIKE} failed with SystemExit: sys\.exit\(0\) was called\n"),
        (
            "rank_1_killed",
            1,
            r"error: rank 1 was killed by signal 9 \(SIGKILL\), often the out-of-",
        ),
        ("no_such_worker", 1, rf"{ALIKE} failed with AttributeError: module "),
    ],
)
def test_failures_are_one_sentence_and_leave_nothing(
    run_dir: Path, worker: str, code: int, sentence: str
) -> None:
    ran = run(worker, run_dir)
    assert ran.code == code
    assert re.match(sentence, ran.errors)
    assert "Traceback" not in ran.errors + ran.output
    assert len(ran.errors.splitlines()) <= 3
    killed = worker == "rank_1_killed"
    why = "and ranks failed again after each" if killed else "that a rank raised itself would"
    assert re.search(rf"\n       not started again: .* {why} ", ran.errors)
    assert ran.output.count("starting all ranks again") == (3 if killed else 0)
    trace = re.search(r"full trace: (\S+)", ran.errors)
    if trace is not None:
        assert "Traceback (most recent call last)" in Path(trace[1]).read_text()
    assert_nothing_left(run_dir)


def test_output_of_ranks_is_shown_once(run_dir: Path) -> None:
    ran = run("noisy", run_dir, ranks=3)
    assert ran.code == 0
    lines = [re.sub(r"\S*fake_workers.py:\d+", "FILE", line) for line in ran.output.splitlines()]
    assert "[rank 1] only here" in lines
    assert sorted(re.sub(r"^\[[^]]*\] ", "", line) for line in lines[1:]) == [
        "FILE: UserWarning: something odd",
        "KeyError: 'inner'",
        "only here",
        "the same everywhere",
    ]


def test_a_port_that_is_taken_is_refused_before_anything_starts(run_dir: Path) -> None:
    with listen(0) as taken:
        port = taken.getsockname()[1]
        ran = run("train", run_dir, launch=LaunchConfig(port=port))
    assert ran.code == 1
    assert ran.errors == (
        f"error: launch.port={port} cannot be used on this host (Address already in use): choose "
        "another port, or launch.port=0 for any free one\n"
    )
    assert_nothing_left(run_dir)


def test_a_mesh_that_does_not_fit_is_refused(run_dir: Path) -> None:
    ran = run("train", run_dir, ranks=3, mesh=MeshConfig(dp_shard=2))
    assert ran.code == 2
    assert ran.errors.startswith("error: the mesh (dp_shard 2) needs 2 ranks, but there are 3")


def test_a_run_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    ran = run("train", file / "run")
    assert ran.code == 1
    assert ran.errors == (
        f"error: the run directory {file}/run cannot be used ({file} is a file): make that "
        "right to go on with its run, or choose another one with --run-dir\n"
    )
    assert ran.output == ""


def test_a_log_that_cannot_be_written_does_not_stop_the_run(run_dir: Path) -> None:
    (run_dir / "events.jsonl").mkdir(parents=True)
    ran = run("train", run_dir)
    assert ran.code == 0
    assert ran.errors.startswith(f"warning: events are missing from {run_dir}/events.jsonl: ")
