"""Asked to stop: the step is finished, the state saved, the exit code says so, nothing is left."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.support import cli

pytestmark = [pytest.mark.multiproc, pytest.mark.chaos, pytest.mark.timeout(240)]
LONG = ("train.steps=100000", "checkpoint.every_steps=0", "train.eval_every=0")
STOPPED, STOPPED_AT_ONCE = 75, 130


def started(run: cli.Command, run_dir: Path, steps: int = 3) -> None:
    """Wait until a few steps are done."""
    assert cli.wait_until(
        lambda: run.process.poll() is not None or len(cli.metrics(run_dir)) >= steps
    )
    assert run.process.poll() is None, run.output


@pytest.mark.parametrize(
    "how",
    [
        "ctrl-c",
        pytest.param("sigterm", marks=pytest.mark.slow),
        pytest.param("sigterm to all", marks=pytest.mark.slow),
    ],
)
def test_stops_after_the_step_and_goes_on_later(small_run: Path, how: str) -> None:
    run_dir = small_run / "r"
    with cli.command("train", "run.yaml", "--run-dir", "r", *LONG, cwd=small_run) as run:
        started(run, run_dir)
        if how == "ctrl-c":
            run.interrupt()
        elif how == "sigterm":
            run.process.send_signal(signal.SIGTERM)
        else:
            os.killpg(run.process.pid, signal.SIGTERM)
        assert run.wait(60) == STOPPED, run.output
        run.assert_nothing_left()
    done = cli.metrics(run_dir)[-1]["step"]
    assert cli.committed_steps(run_dir) == [done]
    assert "Traceback" not in run.output
    code, output = cli.run(
        "train", "run.yaml", "--run-dir", "r", *LONG, f"train.steps={done + 2}", cwd=small_run
    )
    assert code == 0, output
    assert sorted(cli.losses(run_dir)) == list(range(1, done + 3))


def test_ctrl_c_while_the_sample_is_written_ends_it(small_run: Path) -> None:
    few = ("train.steps=2", "train.eval_every=0", "train.eval_batches=0")
    more = (*few, "train.sample_tokens=1000000")
    with cli.command("train", "run.yaml", "--run-dir", "r", *more, cwd=small_run) as run:
        assert cli.wait_until(lambda: "as a sample" in run.output), run.output
        run.interrupt()
        assert run.wait(60) == 0, run.output
        run.assert_nothing_left()
    assert "What it writes now" in run.output


def test_second_ctrl_c_stops_at_once_and_breaks_nothing(small_run: Path) -> None:
    run_dir = small_run / "r"
    (small_run / "held_model.py").write_text(HELD_MODEL)
    held = (
        "model.factory=held_model:make",
        "mesh.tp=1",
        "train.steps=1000",
        "checkpoint.every_steps=2",
    )
    with cli.command("train", "run.yaml", "--run-dir", "r", *held, cwd=small_run) as run:
        started(run, run_dir, steps=4)
        assert cli.wait_until(lambda: bool(cli.committed_steps(run_dir)))
        steps = cli.committed_steps(run_dir)
        (small_run / "hold").touch()
        done = 0
        while done != (done := len(cli.metrics(run_dir))):  # a step that had begun may end yet
            time.sleep(0.5)
        run.interrupt()
        assert cli.wait_until(lambda: "again stops at once" in run.output, 20), run.output
        time.sleep(0.5)  # closer together, two interrupts count as one
        run.interrupt()
        assert run.wait(10) == STOPPED_AT_ONCE, run.output
        run.assert_nothing_left()
    assert steps
    (small_run / "hold").unlink()
    code, output = cli.run(
        "train", "run.yaml", "--run-dir", "r", *held, f"train.steps={steps[-1] + 1}", cwd=small_run
    )
    assert code == 0, output


def test_controller_killed_leaves_no_rank_behind(small_run: Path) -> None:
    run_dir = small_run / "r"
    with cli.command("train", "run.yaml", "--run-dir", "r", *LONG, cwd=small_run) as run:
        started(run, run_dir)
        assert len(run.alive()) > 4
        run.process.kill()
        run.assert_nothing_left()


HELD_MODEL = """
import time
from pathlib import Path

from torch import nn


class Held(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, 16)
        self.head = nn.Linear(16, vocab_size)

    def forward(self, tokens):
        while Path("hold").exists():
            time.sleep(0.05)
        return self.head(self.embed(tokens))


def make(vocab_size, seq_len):
    return Held(vocab_size)
"""
