"""A small corpus and a small run, for tests that go through the command line."""

from pathlib import Path

import pytest

WORDS = (
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "mix",
)


@pytest.fixture
def small_run(tmp_path: Path) -> Path:
    """A directory with ``run.yaml``: seconds on CPU, dropout on, several epochs in 40 steps."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(12):
        order = [WORDS[(i * (number + 3) + i * i) % len(WORDS)] for i in range(110)]
        (text / f"{number}.txt").write_text(" ".join(order))
    (tmp_path / "run.yaml").write_text(
        """
name: small
seed: 7
train: {steps: 40, eval_every: 10, eval_batches: 2, grace_s: 30}
model: {dim: 32, layers: 2, heads: 4, kv_heads: 2, ffn_dim: 64, dropout: 0.1}
data: {source: ["text/*.txt"], seq_len: 64, global_batch: 8, held_out: 0.1}
optim: {lr: 3e-3, warmup_steps: 5}
mesh: {dp_shard: 2, tp: 2}
checkpoint: {every_steps: 10, keep: 3, keeper_linger_s: 1}
"""
    )
    return tmp_path
