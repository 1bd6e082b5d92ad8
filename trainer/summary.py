"""What a finished run tells its user: one screen of at most 100 columns."""

import math
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from everstep.trainer.commands import resume_command
from everstep.trainer.data import samples_in
from everstep.trainer.flops import TERA
from everstep.trainer.progress import short_bytes, short_number

if TYPE_CHECKING:
    from everstep.trainer.loop import Run

WIDTH = 98
SAMPLE_LINES = 12


def summarise(
    run: "Run",
    run_dir: Path,
    nproc: int | None,
    sample: str | None,
    launch: Sequence[str] = (),
    submitted: str | None = None,
) -> list[str]:
    """The closing lines of a run that has done all its steps.

    ``nproc`` is what to suggest for ``--nproc``; None where another launcher decides. ``launch``
    are options that start the run in the same way, and ``submitted`` is as in ``resume_command``.
    """
    config, corpus = run.config, run.corpus
    tokens = run.stream.position * config.data.seq_len  # global_batch may have changed meanwhile
    epochs = run.stream.position / run.stream.samples_per_epoch
    lines = [
        f"Trained {run.engine.parameters / 1e6:.2f} M parameters on {run.shape}",
        f"  data         {corpus.name}: {tokens / 1e6:.3g} M tokens seen, {epochs:.2f} epochs",
    ]
    if len(corpus.parts) > 1:
        for part, share in zip(corpus.parts, corpus.shares, strict=True):
            rounds = run.stream.position * share
            rounds /= samples_in(part.tokens_train.size, config.data.seq_len)
            lines.append(f"    {share:6.2%}   {part.name}: {rounds:.2f} epochs")
    if math.isfinite(run.first_loss):
        lines.append(f"  train loss   {run.first_loss:.3f} -> {run.last_loss:.3f} nats per token")
    else:
        lines.append("  train loss   nothing was left to train")
    if math.isfinite(run.eval_loss):
        lines.append(f"  held-out     {run.eval_loss:.3f} nats per token")
    if (speed := run.meter.typical()) is not None:
        lines.append(f"  speed        {speed_words(speed)}")
    lines.append(
        f"  for scale    {corpus.entropy_nats:.3f} is the unigram entropy of the corpus: "
        "a model that only counts"
    )
    if sample is not None:
        lines += ["", "What it writes now:", *_indent(sample)]
    more = resume_command(
        run_dir,
        nproc,
        f"train.steps={2 * config.train.steps}",
        launch=launch,
        submitted=submitted,
    )
    lines += [
        "",
        f"Everything is in {run_dir}/",
        "  metrics.jsonl  loss of every step    config.yaml  the resolved run",
        f"  {_checkpoints(run)}   step {run.saves.durable_step} is durable    logs/  of every rank",
        "Try next:",
        *_command(more),
        "      goes on from here, twice as far",
        *_command(shlex.join(["everstep", "config", "show", str(run_dir / "config.yaml")])),
        "      everything that can be changed",
    ]
    return lines


def _checkpoints(run: "Run") -> str:
    directory = run.config.checkpoint.directory
    return "checkpoints/" if directory is None else f"checkpoints in {directory}"


def speed_words(speed: Mapping[str, float]) -> str:
    """What ``StepMeter.typical`` says, for people."""
    share = f" ({100 * speed['mfu']:.1f} % MFU)" if "mfu" in speed else ""
    return (
        f"{short_number(speed['tokens_per_s'])} tokens/s, "
        f"{short_number(speed['tflops_per_s'] * TERA)} FLOP/s per device{share}, "
        f"{short_bytes(int(speed['peak_memory_bytes']))} at most on rank 0"
    )


def _command(text: str) -> list[str]:
    """A shell command on as many lines as it takes; one with quoted words stays on one."""
    if "'" in text or len(text) <= WIDTH - 2:
        return [f"  {text}"]
    lines = textwrap.wrap(text, WIDTH - 6, break_long_words=False, break_on_hyphens=False)
    return [f"  {lines[0]} \\", *(f"    {line} \\" for line in lines[1:-1]), f"    {lines[-1]}"]


def _indent(sample: str) -> list[str]:
    printable = "".join(c if c.isprintable() or c == "\n" else "?" for c in sample)
    lines = [
        piece
        for line in printable.splitlines()
        for piece in (textwrap.wrap(line, WIDTH - 4, drop_whitespace=False) or [""])
    ]
    return [f"  | {line}" for line in lines[:SAMPLE_LINES]]
