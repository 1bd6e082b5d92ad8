"""What is suggested can be pasted, and fits a screen."""

import shlex
from pathlib import Path

from everstep.trainer.commands import resume_command
from everstep.trainer.summary import WIDTH, _command


def test_a_long_command_is_continued_on_the_next_line() -> None:
    text = resume_command(Path("runs/demo-20261122-002648"), 4, "train.steps=300")
    lines = _command(text)
    assert len(lines) > 1
    assert max(map(len, lines)) <= WIDTH
    assert shlex.split("\n".join(lines).replace("\\\n", "")) == shlex.split(text)


def test_names_with_spaces_are_quoted_and_not_broken() -> None:
    text = resume_command(Path("my run/" + "x" * 100), None)
    assert _command(text) == [f"  {text}"]
    assert shlex.split(text)[3:] == ["--run-dir", "my run/" + "x" * 100]


def test_a_short_command_stays_on_its_line() -> None:
    assert _command("everstep doctor") == ["  everstep doctor"]
