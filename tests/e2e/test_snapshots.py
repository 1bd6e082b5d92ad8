"""Ranks that were killed go on from the memory of keepers, as if nothing had happened."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from everstep.checkpoint.keeper.place import default_place
from tests.support import cli

pytestmark = [pytest.mark.multiproc, pytest.mark.chaos, pytest.mark.timeout(300)]
TWO = ("mesh.tp=1", "train.steps=24", "checkpoint.every_steps=10")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keepers of these tests have a place of their own, and leave nobody in it."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return default_place()


def train(folder: Path, name: str, *more: str) -> str:
    code, output = cli.run("train", "run.yaml", "--run-dir", name, *TWO, *more, cwd=folder)
    assert code == 0, output
    return output


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def keepers(run: cli.Command) -> list[int]:
    """Processes of keepers, and of who watches them, that a command has started."""
    found = []
    for pid in run.alive():
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"everstep.checkpoint.keeper.main" in command:
            found.append(pid)
    return found


def assert_same(found: Path, expected: Path) -> None:
    assert sorted(cli.losses(expected)) == list(range(1, 25))
    assert cli.losses(found) == cli.losses(expected)
    assert cli.final_bytes(found) == cli.final_bytes(expected)


def test_all_ranks_killed_resume_from_memory_exactly(small_run: Path) -> None:
    train(small_run, "straight", "checkpoint.memory=null")
    output = train(small_run, "drilled", "launch.drill_kill_step=17")
    run_dir = small_run / "drilled"
    assert "all ranks were killed (SIGKILL): starting all ranks again" in output
    (resumed,) = events(run_dir, "resumed")
    assert resumed["path"] == "the memory of keepers"
    # the snapshot of step 17 may have been under way, and no other
    assert resumed["step"] in (16, 17)
    (told,) = events(run_dir, "snapshots")
    assert told["taken"] + told["skipped"] == 24 - resumed["step"]
    assert told["sealed"] == told["durable"] == 24
    assert told["memory_bytes"] == pytest.approx(told["predicted_bytes"], rel=0.2)
    assert_same(run_dir, small_run / "straight")


@pytest.mark.slow
def test_one_rank_killed_by_somebody_else(small_run: Path) -> None:
    train(small_run, "straight", "checkpoint.memory=null")
    run_dir = small_run / "killed"
    arguments = ("train", "run.yaml", "--run-dir", "killed", *TWO)
    with cli.command(*arguments, cwd=small_run) as run:
        assert cli.wait_until(lambda: len(cli.metrics(run_dir)) >= 13), run.output
        (pid,) = [event["pid"] for event in events(run_dir, "started") if event["rank"] == 1]
        os.kill(pid, signal.SIGKILL)
        assert run.wait() == 0, run.output
        run.assert_nothing_left()
        assert "rank 1 was killed (SIGKILL): starting all ranks again" in run.output
    (resumed,) = events(run_dir, "resumed")
    assert resumed["path"] == "the memory of keepers"
    assert_same(run_dir, small_run / "straight")


@pytest.mark.slow
def test_the_command_killed_its_keeper_makes_durable_what_is_newest_and_waits(
    small_run: Path, place: Path
) -> None:
    train(small_run, "straight", "checkpoint.memory=null")
    run_dir = small_run / "killed"
    arguments = ("train", "run.yaml", "--run-dir", "killed", *TWO, "checkpoint.keeper_linger_s=60")
    with cli.command(*arguments, cwd=small_run) as run:
        assert cli.wait_until(lambda: len(cli.metrics(run_dir)) >= 15), run.output
        run.process.kill()
        assert cli.wait_until(lambda: run.alive() == keepers(run)), run.alive()
        assert len(keepers(run)) == 2
        assert cli.wait_until(lambda: max(cli.committed_steps(run_dir), default=0) >= 14)
        output = train(small_run, "killed")
        run.assert_nothing_left()
    assert "resumed from step " in output
    assert "(the memory of keepers), which is in memory on all 2 ranks" in output
    assert_same(run_dir, small_run / "straight")
    assert not list(place.rglob("keeper.sock"))


@pytest.mark.slow
def test_a_run_that_failed_says_what_its_keepers_hold(small_run: Path) -> None:
    (small_run / "bad_model.py").write_text(BAD_MODEL)
    bad = ("model.factory=bad_model:make",)
    with cli.command("train", "run.yaml", "--run-dir", "bad", *TWO, *bad, cwd=small_run) as run:
        assert run.wait() == 1, run.output
        run.assert_nothing_left()
    assert "not started again: an error that a rank raised itself would come again" in run.output
    assert "in memory for 0:01 from now on, to go on: everstep train bad/config.yaml" in run.output
    assert cli.committed_steps(small_run / "bad")[-1] >= 4


@pytest.mark.slow
def test_without_a_keeper_snapshots_are_taken_all_the_same(small_run: Path) -> None:
    output = train(small_run, "alone", "checkpoint.memory=process")
    assert "snapshots: 24 taken, 0 skipped" in output or "skipped (last:" in output
    assert "on rank 0" in output
    (told,) = events(small_run / "alone", "snapshots")
    assert told["durable"] == 24


BAD_MODEL = """
from torch import nn


class Bad(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, 16)
        self.head = nn.Linear(16, vocab_size)
        self.calls = 0

    def forward(self, tokens):
        self.calls += self.training
        if self.calls > 6:
            raise ValueError("a bug")
        return self.head(self.embed(tokens))


def make(vocab_size, seq_len):
    return Bad(vocab_size)
"""
