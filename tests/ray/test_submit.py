"""Runs submitted to a real Ray cluster of two nodes, through the command line as a user has it."""

import json
import sys
import venv
from collections.abc import Mapping
from pathlib import Path

import pytest

from everstep.cluster.ray_nodes import OwnRay
from tests.support import cli

pytestmark = [pytest.mark.ray, pytest.mark.multiproc, pytest.mark.timeout(400)]
DEADLINE_S = 240.0
STEPS = 24
RUN = f"""
name: small
seed: 7
train: {{steps: {STEPS}, eval_batches: 0, grace_s: 60}}
model: {{factory: "my_model:make", factory_args: {{width: 16}}}}
data: {{source: ["text/*.txt"], seq_len: 32, global_batch: 8}}
optim: {{lr: 3e-3, warmup_steps: 5}}
mesh: {{dp_shard: 2}}
launch: {{placement: strict_spread, address: "192.0.2.1:6379"}}
checkpoint: {{every_steps: 0}}
"""
MODEL = """
import os
import time

from torch import nn


class Slow(nn.Module):
    def __init__(self, vocab_size, width):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, tokens):
        time.sleep(float(os.environ.get("SLOW_S", "0")))
        return self.head(self.embed(tokens))


def make(vocab_size, seq_len, width):
    if os.environ.get("BROKEN") == os.environ.get("RANK"):
        raise RuntimeError("the user's code has a defect")
    return Slow(vocab_size, width)
"""


@pytest.fixture
def variables(ray_nodes: OwnRay) -> dict[str, str]:
    """What a command needs to find the cluster and to be let in."""
    return {**ray_nodes.environment, "RAY_API_SERVER_ADDRESS": ray_nodes.dashboard_url}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The user's folder: a config, a model of their own, and texts."""
    folder = tmp_path / "project"
    (folder / "text").mkdir(parents=True)
    for number in range(4):
        text = " ".join(str((i * (number + 3) + i * i) % 97) for i in range(600))
        (folder / "text" / f"{number}.txt").write_text(text)
    (folder / "run.yaml").write_text(RUN)
    (folder / "my_model.py").write_text(MODEL)
    return folder


def everstep(*words: str, cwd: Path, variables: Mapping[str, str]) -> tuple[int, str]:
    return cli.run(*words, cwd=cwd, timeout_s=DEADLINE_S, variables=variables)


def submit(run_dir: Path, *words: str) -> tuple[str, ...]:
    return ("submit", "run.yaml", "--run-dir", str(run_dir), "--python", sys.executable, *words)


def submit_and_stop(project: Path, run_dir: Path, variables: Mapping[str, str]) -> int:
    """A run that is followed, seen to run, and stopped; the step after which it stopped."""
    slow = submit(run_dir, "--env", "SLOW_S=3", "--id", "first")
    with cli.command(*slow, cwd=project, variables=variables) as followed:
        assert cli.wait_until(
            lambda: len(cli.metrics(run_dir)) >= 2 or followed.process.poll() is not None,
            DEADLINE_S,
        ), followed.output
        code, output = everstep("status", cwd=project, variables=variables)
        assert code == 0
        assert ["first", "running"] in [line.split()[:2] for line in output.splitlines()]
        code, output = everstep("stop", "first", cwd=project, variables=variables)
        assert code == 0, output
        assert "first: stopped as asked, exit code 75" in output
        assert followed.wait(60) == 75, followed.output
    done = cli.metrics(run_dir)[-1]["step"]
    assert done < STEPS
    assert cli.committed_steps(run_dir) == [done]
    assert f"stopped, step {done} is saved" in followed.output
    assert f"to go on from step {done}: everstep submit run.yaml" in followed.output
    return int(done)


def test_submit_follow_and_stop(
    project: Path, tmp_path: Path, variables: Mapping[str, str]
) -> None:
    assert submit_and_stop(project, tmp_path / "submitted", variables) >= 2


@pytest.mark.slow
def test_stopped_and_submitted_again_is_one_uninterrupted_run(
    project: Path, tmp_path: Path, variables: Mapping[str, str]
) -> None:
    run_dir = tmp_path / "submitted"
    done = submit_and_stop(project, run_dir, variables)
    code, output = everstep(*submit(run_dir, "--id", "second"), cwd=project, variables=variables)
    assert code == 0, output
    assert f"resumed from step {done}" in output
    assert f"{run_dir} is that of first (stopped)" in output
    code, output = everstep("status", "second", "--json", cwd=project, variables=variables)
    told = json.loads(output)
    assert (told["state"], told["exit_code"], told["step"]) == ("done", 0, STEPS)

    whole = tmp_path / "whole"
    local = ("train", "run.yaml", "--run-dir", str(whole), "--launcher", "local")
    code, output = everstep(*local, cwd=project, variables={})
    assert code == 0, output
    assert cli.losses(run_dir) == cli.losses(whole)
    assert cli.final_bytes(run_dir) == cli.final_bytes(whole)


def test_wrong_addresses_ids_and_a_python_that_lacks_everything(
    project: Path, tmp_path: Path, variables: Mapping[str, str], ray_nodes: OwnRay
) -> None:
    bare = tmp_path / "bare"
    venv.create(bare, with_pip=False, symlinks=True)
    lacking = ("--python", f"{bare}/bin/python", "--id", "lacking")
    code, output = everstep(*submit(tmp_path / "a", *lacking), cwd=project, variables=variables)
    assert code == 1, output
    assert "torch and ray cannot be imported by the job's Python" in output
    assert "runtime env" in output

    gcs = f"http://{ray_nodes.address}"
    code, output = everstep("status", "--address", gcs, cwd=project, variables=variables)
    assert code == 1
    assert "is not a Ray dashboard" in output
    code, output = everstep("stop", "lackin", cwd=project, variables=variables)
    assert code == 1
    assert "the cluster has no job 'lackin'; did you mean lacking?" in output


@pytest.mark.slow
def test_users_code_that_raises(
    project: Path, tmp_path: Path, variables: Mapping[str, str]
) -> None:
    broken = submit(tmp_path / "r", "--env", "BROKEN=1", "--id", "broken")
    code, output = everstep(*broken, cwd=project, variables=variables)
    assert code == 1, output
    assert "the user's code has a defect" in output
    assert "rank 1" in output
    code, output = everstep("status", "broken", cwd=project, variables=variables)
    assert code == 0
    assert "exit code: 1" in output
    assert "the user's code has a defect" in output
    code, output = everstep("logs", "broken", cwd=project, variables=variables)
    assert code == 0
    assert "the user's code has a defect" in output


@pytest.mark.slow
def test_at_once(project: Path, tmp_path: Path, variables: Mapping[str, str]) -> None:
    run_dir = tmp_path / "r"
    slow = submit(run_dir, "--env", "SLOW_S=30", "--id", "hurried")
    with cli.command(*slow, cwd=project, variables=variables) as followed:
        assert cli.wait_until(
            lambda: "corpus:" in followed.output or followed.process.poll() is not None, DEADLINE_S
        )
        code, output = everstep("stop", "hurried", "--now", cwd=project, variables=variables)
        assert code == 0, output
        assert followed.wait(60) == 130, followed.output
    assert cli.committed_steps(run_dir) == []
    code, output = everstep("status", cwd=project, variables=variables)
    assert "-now-" not in output


@pytest.mark.slow
def test_what_the_cluster_does_not_have(
    project: Path, tmp_path: Path, variables: Mapping[str, str]
) -> None:
    words = ("mesh.dp_shard=8", "data.global_batch=8", "launch.resources_per_rank.rocket=1")
    code, output = everstep(*submit(tmp_path / "r", *words), cwd=project, variables=variables)
    assert code == 1, output
    assert "rocket" in output
    wrong = submit(tmp_path / "r", "model.factory=my_model:nothing")
    code, output = everstep(*wrong, cwd=project, variables=variables)
    assert code == 2, output
    assert "has no callable 'nothing'" in output
