"""Commands that are suggested: they go on with the same run, as it was started."""

from pathlib import Path

import pytest

from everstep.trainer.commands import RESUBMIT_VARIABLE, resume_command


def test_a_run_goes_on_from_its_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RESUBMIT_VARIABLE, raising=False)
    command = resume_command(Path("runs/a b"), 4, "train.steps=9", launch=["--launcher", "ray"])
    assert command == (
        "everstep train 'runs/a b/config.yaml' train.steps=9 --run-dir 'runs/a b' --launcher ray "
        "--nproc 4"
    )


def test_a_submitted_run_is_submitted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    submitted = "everstep submit my.yaml train.steps=5 optim.lr=1 --run-dir '/shared/a b'"
    monkeypatch.setenv(RESUBMIT_VARIABLE, submitted)
    assert resume_command(Path("/shared/a b"), 4) == submitted
    again = "everstep submit my.yaml optim.lr=1 --run-dir '/shared/a b' train.steps=9"
    assert resume_command(Path("/shared/a b"), 4, "train.steps=9") == again
