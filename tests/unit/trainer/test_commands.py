"""Commands that are suggested: they go on with the same run, as it was started."""

from pathlib import Path

from everstep.trainer.commands import resume_command


def test_a_run_goes_on_from_its_directory() -> None:
    command = resume_command(Path("runs/a b"), 4, "train.steps=9", launch=["--launcher", "ray"])
    assert command == (
        "everstep train 'runs/a b/config.yaml' train.steps=9 --run-dir 'runs/a b' --launcher ray "
        "--nproc 4"
    )


def test_a_submitted_run_is_submitted_again() -> None:
    submitted = "everstep submit my.yaml train.steps=5 optim.lr=1 --run-dir '/shared/a b'"
    run_dir = Path("/shared/a b")
    assert resume_command(run_dir, 4, submitted=submitted) == submitted
    again = "everstep submit my.yaml optim.lr=1 --run-dir '/shared/a b' train.steps=9"
    assert resume_command(run_dir, 4, "train.steps=9", submitted=submitted) == again
