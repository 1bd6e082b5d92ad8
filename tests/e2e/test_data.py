"""Mixtures and tokenized folders through the command line: trained, killed, resumed elsewhere."""

import json
import math
import random
from pathlib import Path

import pytest

from tests.e2e.conftest import WORDS
from tests.support import cli

RUN = """
name: mixed
seed: 7
train: {steps: 20, eval_every: 10, eval_batches: 2, grace_s: 30}
model: {dim: 32, layers: 2, heads: 4, kv_heads: 2, ffn_dim: 64, dropout: 0.1}
data:
  source:
    - {path: web.jsonl, weight: 3}
    - {path: tokens, weight: 1}
  tokenizer: auto
  seq_len: 64
  global_batch: 8
  held_out: 0.1
optim: {lr: 3e-3, warmup_steps: 5, schedule: constant}
mesh: {dp_shard: 2}
checkpoint: {every_steps: 5, keep: 3}
"""


@pytest.fixture
def mixed_run(tmp_path: Path) -> Path:
    """A directory with ``run.yaml``: a mixture of JSON lines and of tokens made here."""
    rng = random.Random(5)
    for name, rows in (("web.jsonl", 60), ("code.jsonl", 40)):
        lines = [json.dumps({"text": " ".join(rng.choices(WORDS, k=80))}) for _ in range(rows)]
        (tmp_path / name).write_text("\n".join(lines))
    (tmp_path / "run.yaml").write_text(RUN)
    code, output = cli.run(
        *("data", "tokenize", "code.jsonl", "--tokenizer", "bytes", "--output", "tokens"),
        *("--shard-tokens", "5000"),
        cwd=tmp_path,
    )
    assert code == 0, output
    return tmp_path


@pytest.mark.slow
def test_a_mixture_goes_on_exactly_with_another_number_of_ranks(mixed_run: Path) -> None:
    code, output = cli.run("train", "run.yaml", "--run-dir", "straight", cwd=mixed_run)
    assert code == 0, output
    assert "75.00%   web.jsonl" in output
    assert "25.00%   tokens" in output
    expected = cli.losses(mixed_run / "straight")
    assert sorted(expected) == list(range(1, 21))

    with cli.command("train", "run.yaml", "--run-dir", "killed", cwd=mixed_run) as started:
        assert cli.wait_until(
            lambda: (
                started.process.poll() is not None
                or any(line["step"] >= 7 for line in cli.metrics(mixed_run / "killed"))
            )
        )
        started.kill_all()
    code, output = cli.run(
        "train", "run.yaml", "mesh.dp_shard=1", "--run-dir", "killed", cwd=mixed_run
    )
    assert code == 0, output
    found = cli.losses(mixed_run / "killed")
    assert sorted(found) == list(range(1, 21))
    for step, loss in expected.items():
        assert math.isclose(found[step], loss, rel_tol=1e-5), (step, found[step], loss)
