from pathlib import Path

import pytest

from everstep.cluster.causes import Cause
from everstep.cluster.closing import Outcome, closing_lines, restart_line

LOGS = Path("runs/x/logs")
AGAIN = "everstep train again"


def text(outcome: Outcome, world_size: int = 4) -> list[str]:
    return [line.text for line in closing_lines(outcome, LOGS, world_size, AGAIN)]


def failed(cause: Cause | None = None, failure: str | None = None, **more: int) -> Outcome:
    return Outcome(exit_code=1, cause=cause, failure=failure, **more)


def test_a_run_that_is_done_needs_no_words() -> None:
    assert text(Outcome(exit_code=0)) == []


def test_a_stopped_run_says_what_is_saved() -> None:
    saved = Outcome(exit_code=75, saved_step=12)
    assert text(saved) == ["stopped, step 12 is saved", f"to go on from step 12: {AGAIN}"]
    assert "before anything new" in text(Outcome(exit_code=75))[0]


def test_an_interrupted_run_says_what_is_lost() -> None:
    assert text(Outcome(exit_code=130, saved_step=5)) == [
        "stopped at once, without saving",
        f"to go on from step 5: {AGAIN}",
    ]


def test_a_failure_says_the_cause_then_where_then_how_to_go_on() -> None:
    cause = Cause(
        rank=2,
        sentence="rank 2 failed with ValueError: boom",
        traceback_file="runs/x/logs/rank-00002.log",
        exit_code=1,
        others=(0,),
    )
    lines = closing_lines(failed(cause, saved_step=7), LOGS, 4, AGAIN)
    assert all(line.is_error for line in lines)
    assert [line.text for line in lines] == [
        "error: rank 2 failed with ValueError: boom",
        "       full trace: runs/x/logs/rank-00002.log",
        "       rank 0 failed too, in another way: see runs/x/logs",
        f"       to go on from step 7: {AGAIN}",
    ]


def test_a_failure_says_why_it_was_not_tried_again() -> None:
    lines = text(Outcome(exit_code=1, failure="it broke", not_again="it would come again"))
    assert lines[-1] == "       not started again: it would come again"


@pytest.mark.parametrize(
    ("alike", "who"), [((), "rank 1 was"), ((2,), "ranks 1-2 were"), ((0, 2), "all ranks were")]
)
def test_a_restart_says_why_and_how_often(alike: tuple[int, ...], who: str) -> None:
    cause = Cause(
        rank=1,
        sentence="",
        brief="was killed (SIGKILL)",
        traceback_file=None,
        exit_code=1,
        alike=alike,
    )
    assert restart_line(cause, 3, 1, 3) == (
        f"{who} killed (SIGKILL): starting all ranks again from the newest saved step, restart 1 "
        "of 3"
    )


def test_ranks_that_failed_alike_are_named_together() -> None:
    boom = Cause(
        rank=1,
        sentence="rank 1 failed with ValueError: boom",
        traceback_file=None,
        exit_code=1,
        alike=(2, 3),
    )
    assert text(failed(boom), 4)[0] == "error: ranks 1-3 failed with ValueError: boom"
    assert text(failed(boom), 3)[0] == "error: all ranks failed with ValueError: boom"
    assert text(failed(boom))[1] == "       its log: runs/x/logs/rank-00001.log"


def test_deliberate_errors_name_their_rank_where_it_matters() -> None:
    cause = Cause(rank=1, sentence="disk full", traceback_file="t", exit_code=1)
    assert text(failed(cause))[0] == "error: disk full (rank 1)"
    assert text(failed(cause), world_size=1)[0] == "error: disk full"
    alike = Cause(rank=0, sentence="disk full", traceback_file="t", exit_code=1, alike=(1,))
    assert text(failed(alike))[0] == "error: disk full (ranks 0-1)"
    assert text(failed(alike), world_size=2)[0] == "error: disk full"


def test_failures_of_the_launcher_come_first() -> None:
    assert text(failed(failure="the launcher broke")) == [
        "error: the launcher broke",
        "       logs: runs/x/logs",
    ]
