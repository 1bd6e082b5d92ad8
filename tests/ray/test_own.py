"""everstep train with a Ray of its own on this host, through the command line."""

import os
import signal
from pathlib import Path

import pytest

from everstep.cluster.shared_dir import wait_for_ranks
from tests.support import cli

pytestmark = [pytest.mark.ray, pytest.mark.multiproc, pytest.mark.timeout(600)]
DEMO = (
    "train",
    "demo",
    "train.steps=4",
    "train.eval_batches=0",
    "train.eval_every=0",
    "train.sample_tokens=0",
    "model.dim=64",
    "model.layers=2",
    "data.source=text/*.txt",
    "data.seq_len=64",
)


def processes(run: cli.Command, words: str) -> list[int]:
    """Processes of a command whose command line has these words, oldest first."""
    found = []
    for pid in sorted(run.alive()):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if words in line:
            found.append(pid)
    return found


def test_the_demo_on_two_simulated_nodes_is_that_of_the_local_launcher(small_run: Path) -> None:
    """``auto`` takes Ray; everything but the launcher is the same, bit for bit."""
    local = cli.run(*DEMO, "--run-dir", "local", "--launcher", "local", cwd=small_run)
    assert local[0] == 0, local[1]
    code, output = cli.run(*DEMO, "--run-dir", "ray", "--launcher", "auto", cwd=small_run)
    assert code == 0, output
    assert "starting Ray on this host (2 simulated nodes)" in output
    assert "Ray" not in local[1]
    for line in local[1].splitlines():
        if line.startswith("step 4/4"):
            assert line.split(" · ")[1] in output
    assert cli.losses(small_run / "ray") == cli.losses(small_run / "local")
    assert cli.final_bytes(small_run / "ray") == cli.final_bytes(small_run / "local")
    assert len(cli.final_bytes(small_run / "ray")) == 4
    logs = {path.name for path in (small_run / "ray" / "logs").iterdir()}
    # Ray writes a log of its own where it has something to say, of a disk that is full, for one
    assert logs - {"ray.log"} == {f"rank-{rank:05d}.log" for rank in range(4)}


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize(
    ("victim", "sentence"),
    [
        ("command", ""),
        ("gcs_server", "error: the head of this run's Ray ended (gcs_server)"),
        ("raylet/raylet", "error: the head of this run's Ray ended (raylet)"),
    ],
)
def test_killed_it_leaves_nothing_and_goes_on(small_run: Path, victim: str, sentence: str) -> None:
    short = ("train.steps=24", "checkpoint.every_steps=4", "launch.simulated_nodes=2")
    code, output = cli.run("train", "run.yaml", "--run-dir", "straight", *short, cwd=small_run)
    assert code == 0, output
    arguments = ("train", "run.yaml", "--run-dir", "r", *short, "--launcher", "ray")
    run_dir = small_run / "r"
    with cli.command(*arguments, cwd=small_run) as run:
        assert cli.wait_until(lambda: len(cli.metrics(run_dir)) >= 6), run.output
        if victim == "command":
            run.process.kill()
        else:
            os.kill(processes(run, victim)[0], signal.SIGKILL)
        code = run.wait(60)
        run.assert_nothing_left()
        assert sentence in run.output
        assert code == (-signal.SIGKILL if victim == "command" else 1)
    assert wait_for_ranks(run_dir, 0)
    code, output = cli.run(*arguments, cwd=small_run)
    assert code == 0, output
    assert cli.losses(run_dir) == cli.losses(small_run / "straight")
    assert cli.final_bytes(run_dir) == cli.final_bytes(small_run / "straight")


@pytest.mark.slow
@pytest.mark.chaos
def test_ctrl_c_while_ray_starts(small_run: Path) -> None:
    arguments = ("train", "run.yaml", "--run-dir", "r", "--launcher", "ray")
    with cli.command(*arguments, cwd=small_run) as run:
        assert cli.wait_until(lambda: "starting Ray on this host" in run.output)
        run.interrupt()
        assert run.wait(60) == 75, run.output
        run.assert_nothing_left()
        assert "Traceback" not in run.output
