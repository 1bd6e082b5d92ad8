"""A run's checkpoint goes to transformers' format, and another run begins with it."""

import math
from pathlib import Path

import pytest

from everstep.checkpoint.convert.hf import export_hf
from everstep.checkpoint.open_place import open_place
from tests.support import cli

FAST = ("model.dropout=0", "train.eval_every=0", "train.eval_batches=2", "checkpoint.every_steps=2")
"""The small run, without what would make a first loss differ from an evaluation's."""
STILL = ("train.steps=1", "optim.lr=1e-12", "optim.warmup_steps=0")
"""One step that changes next to nothing: its evaluation is that of the weights it began with."""


def eval_loss(run_dir: Path) -> float:
    return float(cli.metrics(run_dir)[-1]["eval_loss"])


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.timeout(300)
def test_training_goes_on_from_an_export(small_run: Path) -> None:
    def train(name: str, *overrides: str) -> str:
        arguments = ("train", "run.yaml", "--run-dir", name, *FAST, *overrides)
        code, output = cli.run(*arguments, cwd=small_run, timeout_s=200)
        assert code == 0, output
        return output

    train("first", "mesh.tp=1", "train.steps=4")
    with open_place(small_run / "first").open() as reader:
        assert reader.manifest.step == 4
        export_hf(reader, small_run / "hf")

    output = train("second", "model.init_from=hf", "mesh.dp_shard=1", *STILL)
    assert "beginning with the weights of hf" in output
    first, second = eval_loss(small_run / "first"), eval_loss(small_run / "second")
    assert math.isclose(first, second, rel_tol=1e-5)
    before = cli.losses(small_run / "first")[1]
    assert cli.losses(small_run / "second")[1] < before - 0.01

    # once it has saved, its own state counts, whatever becomes of the export
    (small_run / "hf" / "config.json").unlink()
    output = train("second", "model.init_from=hf", "mesh.dp_shard=1", *STILL[1:], "train.steps=2")
    assert "beginning with" not in output
