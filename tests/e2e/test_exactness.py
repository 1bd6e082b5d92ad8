"""A run that was killed and resumed is the run that was not, bit for bit."""

import math
from pathlib import Path

import pytest

from tests.support import cli

pytestmark = [pytest.mark.multiproc, pytest.mark.chaos, pytest.mark.timeout(300)]


def train(folder: Path, name: str, *more: str) -> Path:
    """Train ``run.yaml`` to its end in run directory ``name``."""
    code, output = cli.run("train", "run.yaml", "--run-dir", name, *more, cwd=folder)
    assert code == 0, output
    return folder / name


def kill_after_step(folder: Path, name: str, step: int, *more: str) -> None:
    """Train, and SIGKILL every process once ``step`` is done, and some step is durable."""
    run_dir = folder / name

    def is_there() -> bool:
        done = any(line["step"] >= step for line in cli.metrics(run_dir))
        return done and bool(cli.committed_steps(run_dir))

    with cli.command("train", "run.yaml", "--run-dir", name, *more, cwd=folder) as started:
        assert cli.wait_until(lambda: started.process.poll() is not None or is_there())
        assert started.process.poll() is None, started.output
        started.kill_all()
        started.assert_nothing_left()


def test_killed_and_resumed_equals_uninterrupted(small_run: Path) -> None:
    straight = train(small_run, "straight")
    kill_after_step(small_run, "killed", 23)
    # what was on its way to storage is lost: its keeper was killed, too
    assert {*cli.committed_steps(small_run / "killed")} <= {10, 20, 30}
    resumed = train(small_run, "killed", "--resume", "auto")

    assert cli.metrics(straight)[0]["loss"] > cli.metrics(straight)[-1]["loss"]
    assert sorted(cli.losses(straight)) == list(range(1, 41))
    assert cli.losses(resumed) == cli.losses(straight)
    assert [m.get("eval_loss") for m in cli.metrics(resumed)] == [
        m.get("eval_loss") for m in cli.metrics(straight)
    ]
    final = cli.final_bytes(straight)
    assert len(final) == 4
    assert cli.final_bytes(resumed) == final
    superseded = (resumed / "metrics.superseded.jsonl").read_text().splitlines()
    assert len(superseded) >= 3


@pytest.mark.slow
def test_fewer_ranks_go_on_with_the_same_batches(small_run: Path) -> None:
    straight = train(small_run, "straight", "mesh.dp_shard=4", "mesh.tp=1")
    shrinking = small_run / "shrinking"
    for ranks, steps in ((4, 14), (2, 26), (1, 40)):
        train(
            small_run,
            "shrinking",
            f"mesh.dp_shard={ranks}",
            "mesh.tp=1",
            f"train.steps={steps}",
            "optim.schedule=constant",
        )
    reference = train(
        small_run, "reference", "mesh.dp_shard=4", "mesh.tp=1", "optim.schedule=constant"
    )
    expected, found = cli.losses(reference), cli.losses(shrinking)
    assert sorted(found) == list(range(1, 41))
    for step, loss in expected.items():
        assert math.isclose(found[step], loss, rel_tol=1e-5), (step, found[step], loss)
    assert cli.losses(straight) != expected  # the schedules differ: the comparison can fail


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        ["mesh.dp_shard=1", "mesh.tp=1"],
        ["mesh.dp_shard=2", "mesh.tp=1"],
        ["mesh.dp_shard=4", "mesh.tp=1"],
        ["mesh.dp_replicate=2", "mesh.dp_shard=2", "mesh.tp=1"],
        ["mesh.dp_replicate=2", "mesh.dp_shard=1", "mesh.tp=1"],
        ["mesh.dp_shard=1", "mesh.tp=2"],
        ["mesh.dp_shard=2", "mesh.tp=2", "data.micro_batch=2"],
        ["mesh.dp_shard=2", "mesh.tp=1", "parallel.precision=bf16"],
        ["mesh.dp_shard=2", "mesh.tp=1", "parallel.activation_checkpointing=true"],
        ["mesh.dp_shard=2", "mesh.tp=1", "model.tie_embeddings=true"],
        ["mesh.dp_shard=2", "mesh.tp=1", "model.factory=dropout_model:make"],
    ],
    ids=" ".join,
)
def test_every_layout_resumes_exactly(small_run: Path, mesh: list[str]) -> None:
    (small_run / "dropout_model.py").write_text(DROPOUT_MODEL)
    straight = train(small_run, "straight", *mesh)
    kill_after_step(small_run, "killed", 15, *mesh)
    resumed = train(small_run, "killed", *mesh)
    assert cli.losses(resumed) == cli.losses(straight)
    assert cli.final_bytes(resumed) == cli.final_bytes(straight)


@pytest.mark.slow
def test_random_generators_of_a_user_model_resume_exactly(small_run: Path) -> None:
    """torch's own dropout draws from the generators that the checkpoint must carry."""
    (small_run / "dropout_model.py").write_text(DROPOUT_MODEL)
    model = ["model.factory=dropout_model:make", "mesh.dp_shard=2", "mesh.tp=1"]
    straight = train(small_run, "straight", *model)
    kill_after_step(small_run, "killed", 12, *model)
    resumed = train(small_run, "killed", *model)
    assert cli.losses(resumed) == cli.losses(straight)
    assert cli.final_bytes(resumed) == cli.final_bytes(straight)


DROPOUT_MODEL = """
import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.head = nn.Linear(32, vocab_size)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + nn.functional.dropout(torch.relu(layer(x)), 0.2, self.training)
        return self.head(x)


def make(vocab_size, seq_len):
    return Tiny(vocab_size)
"""
