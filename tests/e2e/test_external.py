"""Ranks that somebody else starts: torchrun."""

import sys
from pathlib import Path

import pytest

from tests.support import cli

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(240)]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_torchrun_gives_the_losses_of_the_local_launcher(small_run: Path) -> None:
    run = ("train", "run.yaml", "train.steps=6", "mesh.tp=1")
    code, output = cli.run(*run, "--run-dir", "local", "--nproc", "2", cwd=small_run)
    assert code == 0, output
    with cli.command(*run, "--run-dir", "external", cwd=small_run, launcher=TORCHRUN) as started:
        assert started.wait() == 0, started.output
        started.assert_nothing_left()
    assert cli.losses(small_run / "external") == cli.losses(small_run / "local")
    assert cli.final_bytes(small_run / "external") == cli.final_bytes(small_run / "local")
