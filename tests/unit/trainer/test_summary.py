"""What is suggested can be pasted, and fits a screen."""

import math
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from everstep.trainer.commands import resume_command
from everstep.trainer.config_load import load_config
from everstep.trainer.summary import WIDTH, _command, summarise


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


def test_tokens_seen_are_those_that_the_data_position_counts() -> None:
    # after half of the run, data.global_batch was doubled: steps x batch would be 64 samples
    overrides = ["train.steps=4", "data.global_batch=16", "data.seq_len=1000"]
    run: Any = SimpleNamespace(
        config=load_config("debug_single", overrides),
        corpus=SimpleNamespace(name="my text", parts=[None], entropy_nats=3.0),
        stream=SimpleNamespace(position=48, samples_per_epoch=96),
        engine=SimpleNamespace(parameters=1e6),
        meter=SimpleNamespace(typical=lambda: None),
        shape="one rank",
        first_loss=2.0,
        last_loss=1.0,
        eval_loss=math.nan,
        saves=SimpleNamespace(durable_step=4),
    )
    submitted = "everstep submit my.yaml --run-dir /shared/r"
    lines = summarise(run, Path("/shared/r"), 1, None, submitted=submitted)
    assert "  data         my text: 0.048 M tokens seen, 0.50 epochs" in lines
    assert f"  {submitted} train.steps=8" in lines
