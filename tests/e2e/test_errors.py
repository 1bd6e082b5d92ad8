"""Mistakes and accidents as a new user meets them: one clear sentence, a way out, nothing lost."""

import socket
import subprocess
from pathlib import Path

import pytest

from tests.support import cli

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(240)]
FAST = (
    "train.steps=4",
    "checkpoint.every_steps=2",
    "train.eval_every=0",
    "train.eval_batches=0",
    "mesh.tp=1",
)


def fails(folder: Path, *args: str, code: int, says: list[str]) -> str:
    """The command fails with this code and these words, without a traceback on the screen."""
    found, output = cli.run("train", *args, cwd=folder)
    assert found == code, output
    assert "Traceback" not in output, output
    flat = " ".join(output.split())
    for words in says:
        assert words in flat, f"{words!r} is not in:\n{output}"
    return output


def test_misspelt_key(small_run: Path) -> None:
    fails(
        small_run,
        "run.yaml",
        "data.globl_batch=8",
        code=2,
        says=["data.globl_batch", "data.global_batch"],
    )


def test_mesh_that_does_not_fit(small_run: Path) -> None:
    fails(small_run, "run.yaml", "--nproc", "3", code=2, says=["3", "mesh"])


def test_missing_config(small_run: Path) -> None:
    fails(small_run, "no_such.yaml", code=2, says=["no_such.yaml"])


def test_missing_data(small_run: Path) -> None:
    fails(
        small_run,
        "run.yaml",
        "data.source=nowhere/*.txt",
        code=1,
        says=["nowhere/*.txt", "data.source"],
    )


@pytest.mark.slow
def test_flipped_byte_is_named_and_the_older_checkpoint_still_loads(small_run: Path) -> None:
    code, output = cli.run("train", "run.yaml", "--run-dir", "r", *FAST, cwd=small_run)
    assert code == 0, output
    assert cli.committed_steps(small_run / "r") == [2, 4]
    pack = next((small_run / "r").glob("checkpoints/step-00000004-*/rank-00001-*.safetensors"))
    damaged = bytearray(pack.read_bytes())
    damaged[len(damaged) // 2] ^= 0x10
    pack.write_bytes(damaged)
    more = [*FAST, "train.steps=6"]
    output = fails(
        small_run,
        "run.yaml",
        "--run-dir",
        "r",
        *more,
        code=1,
        says=["damaged", pack.name[:10], "--resume"],
    )
    assert cli.committed_steps(small_run / "r") == [2, 4]
    code, output = cli.run(
        "train", "run.yaml", "--run-dir", "r", *more, "--resume", "2", cwd=small_run
    )
    assert code == 0, output
    assert sorted(cli.losses(small_run / "r")) == [1, 2, 3, 4, 5, 6]


def test_full_disk_keeps_the_last_checkpoint(small_run: Path, small_disk: Path) -> None:
    run_dir = small_disk / "r"
    more = ["model.dim=64", "model.ffn_dim=128", "checkpoint.keep=20", *FAST]
    more += ["checkpoint.memory=null", "train.steps=40"]
    fails(
        small_run,
        "run.yaml",
        "--run-dir",
        str(run_dir),
        *more,
        code=1,
        says=["No space left on device", "earlier checkpoints are untouched"],
    )
    steps = cli.committed_steps(run_dir)
    assert steps
    assert sorted(p.name.split("-")[1] for p in run_dir.glob("checkpoints/step-*")) == [
        f"{step:08d}" for step in steps
    ]
    subprocess.check_call(["mount", "-o", "remount,size=64m", str(small_disk)])
    more[-1] = f"train.steps={steps[-1] + 1}"
    code, output = cli.run("train", "run.yaml", "--run-dir", str(run_dir), *more, cwd=small_run)
    assert code == 0, output
    assert sorted(cli.losses(run_dir)) == list(range(1, steps[-1] + 2))


@pytest.mark.slow
def test_a_full_disk_stops_snapshots_from_getting_durable_but_not_training(
    small_run: Path, small_disk: Path
) -> None:
    run_dir = small_disk / "r"
    more = ["model.dim=64", "model.ffn_dim=128", "checkpoint.keep=20", *FAST, "train.steps=40"]
    code, output = cli.run("train", "run.yaml", "--run-dir", str(run_dir), *more, cwd=small_run)
    assert code == 1, output
    assert output.count("training goes on, and later steps are tried as well") == 1
    assert "error: saving step 40 failed: " in output
    assert sorted(cli.losses(run_dir)) == list(range(1, 41))
    steps = cli.committed_steps(run_dir)
    assert steps
    subprocess.check_call(["mount", "-o", "remount,size=64m", str(small_disk)])
    more[-1] = "train.steps=41"
    code, output = cli.run("train", "run.yaml", "--run-dir", str(run_dir), *more, cwd=small_run)
    assert code == 0, output
    assert sorted(cli.losses(run_dir)) == list(range(1, 42))


def test_directory_in_use_by_another_job(small_run: Path) -> None:
    with cli.command(
        "train", "run.yaml", "--run-dir", "r", "train.steps=100000", cwd=small_run
    ) as first:
        assert cli.wait_until(lambda: bool(cli.metrics(small_run / "r"))), first.output
        fails(
            small_run, "run.yaml", "--run-dir", "r", code=1, says=["in use", str(first.process.pid)]
        )
        assert first.process.poll() is None


def test_port_taken(small_run: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        fails(small_run, "run.yaml", f"launch.port={port}", code=1, says=[str(port), "launch.port"])


def test_a_rank_that_raises_is_named_first(small_run: Path) -> None:
    (small_run / "broken_model.py").write_text(BROKEN_MODEL)
    output = fails(
        small_run,
        "run.yaml",
        "--run-dir",
        "r",
        "model.factory=broken_model:make",
        "mesh.dp_shard=4",
        *FAST,
        code=1,
        says=["rank 2", "the seventh seal", "logs"],
    )
    assert output.count("the seventh seal") == 1
    trace = "".join(p.read_text() for p in (small_run / "r" / "logs").iterdir())
    assert "broken_model.py" in trace
    assert "Traceback" in trace


@pytest.mark.parametrize("memory", [pytest.param("null", marks=pytest.mark.slow), "keeper"])
def test_a_gradient_that_is_no_number_is_never_saved(small_run: Path, memory: str) -> None:
    (small_run / "nan_model.py").write_text(NAN_MODEL)
    fails(
        small_run,
        "run.yaml",
        "--run-dir",
        "r",
        "model.factory=nan_model:make",
        *FAST,
        "checkpoint.every_steps=1",
        f"checkpoint.memory={memory}",
        code=1,
        says=["the gradient norm of step 3 is nan", "go on from step "],
    )
    # with snapshots the keeper makes durable what it still held
    assert cli.committed_steps(small_run / "r") == [1, 2]
    assert sorted(cli.losses(small_run / "r")) == [1, 2]


def test_a_model_without_a_row_of_logits_per_token_is_named(small_run: Path) -> None:
    (small_run / "narrow_model.py").write_text(NARROW_MODEL)
    fails(
        small_run,
        "run.yaml",
        "model.factory=narrow_model:make",
        *FAST,
        code=2,
        says=["model.factory returned shape", "expected logits"],
    )


@pytest.mark.slow
def test_resume_never_and_missing_step_are_refused(small_run: Path) -> None:
    code, output = cli.run("train", "run.yaml", "--run-dir", "r", *FAST, cwd=small_run)
    assert code == 0, output
    arguments = ("run.yaml", "--run-dir", "r", *FAST)
    fails(small_run, *arguments, "--resume", "never", code=1, says=["step 4", "--run-dir"])
    fails(small_run, *arguments, "--resume", "3", code=1, says=["step 3", "2, 4"])
    assert cli.committed_steps(small_run / "r") == [2, 4]


@pytest.mark.slow
def test_other_text_or_model_cannot_be_resumed(small_run: Path) -> None:
    arguments = ("run.yaml", "--run-dir", "r", *FAST)
    code, output = cli.run("train", *arguments, cwd=small_run)
    assert code == 0, output
    more = (*arguments, "train.steps=6")
    fails(small_run, *more, "model.dim=64", code=1, says=["does not fit", "model.model."])
    (small_run / "text" / "0.txt").write_text("other words " * 50)
    fails(small_run, *more, code=1, says=["text", "began with"])


NARROW_MODEL = """
from torch import nn


def make(vocab_size, seq_len):
    return nn.Sequential(nn.Embedding(vocab_size, 16), nn.Linear(16, 7))
"""
FAILING_MODEL = """
import torch.distributed as dist
from torch import nn


class Failing(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, 16)
        self.head = nn.Linear(16, vocab_size)
        self.calls = 0

    def forward(self, tokens):
        self.calls += 1
        x = self.embed(tokens)
        if self.calls == 3:
            {third_call}
        return self.head(x)


def make(vocab_size, seq_len):
    return Failing(vocab_size)
"""
NAN_MODEL = FAILING_MODEL.format(
    third_call='x.register_hook(lambda gradient: gradient * float("nan"))'
)
BROKEN_MODEL = FAILING_MODEL.format(
    third_call='if dist.get_rank() == 2: raise RuntimeError("the seventh seal")'
)
