"""What a person is told at the end of a run: pure functions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from everstep.cluster import exit_codes
from everstep.cluster.causes import Cause
from everstep.cluster.lifecycle import name_ranks
from everstep.trainer.progress import clock_time


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    exit_code: int
    failure: str | None = None
    """Why it failed, where no rank failed on its own."""
    cause: Cause | None = None
    """Which rank failed first, where one did."""
    not_again: str | None = None
    """Why ranks that failed were not started again, where they might have been."""
    step: int | None = None
    """The last step that was reported."""
    saved_step: int | None = None
    """The newest step that this start of the run made durable."""
    sealed_step: int | None = None
    """The newest step that rank 0 is known to have had in memory."""


@dataclass(frozen=True)
class Line:
    """A line to print; errors go to standard error."""

    text: str
    is_error: bool = False


def closing_lines(
    outcome: Outcome, logs: Path, world_size: int, again: str, *, kept_s: float = 0.0
) -> list[Line]:
    """The last lines of a run, the most important first.

    Args:
        logs: folder of the ranks' logs.
        again: how to go on with it.
        kept_s: how long keepers hold the snapshots of a run that failed.
    """
    if outcome.exit_code == exit_codes.DONE:
        return []
    if outcome.exit_code == exit_codes.STOPPED:
        return [Line(_stopped(outcome)), _go_on(outcome, again)]
    if outcome.exit_code == exit_codes.INTERRUPTED:
        return [Line("stopped at once, without saving"), _go_on(outcome, again)]
    lines = [Line(f"error: {_what_failed(outcome, world_size)}", is_error=True)]
    lines += [Line(f"       {text}", is_error=True) for text in _where(outcome, logs)]
    if outcome.not_again is not None:
        lines.append(Line(f"       not started again: {outcome.not_again}", is_error=True))
    sealed = outcome.sealed_step
    if sealed is not None and kept_s > 0 and sealed > (outcome.saved_step or 0):
        told = f"keepers hold step {sealed} in memory for {clock_time(kept_s)} from now on"
        lines.append(Line(f"       {told}, to go on: {again}", is_error=True))
    elif outcome.saved_step is not None:
        lines.append(Line(f"       {_go_on(outcome, again).text}", is_error=True))
    return lines


def restart_line(cause: Cause | None, world_size: int, restart: int, max_restarts: int) -> str:
    """What is told when all ranks start again, for the ``restart``-th time in a row."""
    what = "ranks failed"
    if cause is not None:
        ranks = (cause.rank, *cause.alike)
        who = "all ranks" if len(ranks) == world_size > 1 else name_ranks(ranks)
        brief = cause.brief if len(ranks) == 1 else re.sub(r"^was ", "were ", cause.brief)
        what = f"{who} {brief}"
    return (
        f"{what}: starting all ranks again from the newest saved step, restart {restart} of "
        f"{max_restarts}"
    )


def _what_failed(outcome: Outcome, world_size: int) -> str:
    cause = outcome.cause
    if outcome.failure is not None or cause is None:
        return outcome.failure or "the run failed without a reason (please report this)"
    failed = (cause.rank, *cause.alike)
    who = "all ranks" if len(failed) == world_size else name_ranks(failed)
    own = f"rank {cause.rank} "
    if cause.sentence.startswith(own):
        return f"{who} {cause.sentence.removeprefix(own)}" if cause.alike else cause.sentence
    return cause.sentence if len(failed) == world_size else f"{cause.sentence} ({who})"


def _where(outcome: Outcome, logs: Path) -> Sequence[str]:
    cause = outcome.cause
    if outcome.failure is not None or cause is None:
        return [f"logs: {logs}"]
    trace = cause.traceback_file
    where = [f"full trace: {trace}" if trace else f"its log: {logs}/rank-{cause.rank:05d}.log"]
    if cause.others:
        where.append(f"{name_ranks(cause.others)} failed too, in another way: see {logs}")
    return where


def _stopped(outcome: Outcome) -> str:
    if outcome.saved_step is None:
        return "stopped before anything new was to be saved"
    return f"stopped, step {outcome.saved_step} is saved"


def _go_on(outcome: Outcome, again: str) -> Line:
    saved = "what was saved before" if outcome.saved_step is None else f"step {outcome.saved_step}"
    return Line(f"to go on from {saved}: {again}")
