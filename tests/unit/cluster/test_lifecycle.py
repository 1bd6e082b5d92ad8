import signal
from dataclasses import replace

import pytest

from everstep.cluster.lifecycle import (
    DEBOUNCE_S,
    DUMP_S,
    SETTLE_LOST_PEER_S,
    SETTLE_S,
    UNKILLABLE_S,
    Action,
    Event,
    Job,
    LauncherBroke,
    RankEnded,
    RankFailed,
    RankStarted,
    State,
    StopAsked,
    Tick,
    name_ranks,
    transition,
)

CTRL_C = StopAsked("Ctrl-C", insistent=True)
SIGTERM = StopAsked("SIGTERM", insistent=False)
KILLED = -signal.SIGKILL
NEW = Job(world_size=2, grace_s=60, start_by_s=100)
RUNNING = replace(NEW, state=State.RUNNING, started=frozenset({0, 1}))


def after(job: Job, *events: tuple[Event, float]) -> tuple[Job, list[Action]]:
    actions: list[Action] = []
    for event, now_s in events:
        decided = transition(job, event, now_s)
        job = decided.job
        actions += decided.actions
    return job, actions


def ends(*codes: int, now_s: float = 50) -> list[tuple[Event, float]]:
    return [(RankEnded(rank, code), now_s) for rank, code in enumerate(codes)]


def test_runs_once_all_ranks_have_started() -> None:
    job, _ = after(NEW, (RankStarted(1), 1))
    assert job.state is State.STARTING
    job, actions = after(job, (RankStarted(0), 2))
    assert job.state is State.RUNNING
    assert not actions


def test_done_when_all_ranks_are() -> None:
    job, actions = after(RUNNING, *ends(0, 0))
    assert (job.state, job.exit_code, job.over, actions) == (State.DONE, 0, True, [])


def test_not_over_while_a_rank_is_left() -> None:
    job, _ = after(RUNNING, (RankEnded(0, 0), 1))
    assert not job.over


def test_asked_to_stop_all_ranks_get_the_grace_time() -> None:
    job, actions = after(RUNNING, (SIGTERM, 10), (Tick(), 69.9))
    assert job.state is State.STOPPING
    assert actions == [Action.ASK_STOP]
    job, actions = after(job, *ends(75, 75, now_s=69.95))
    assert (job.state, job.exit_code, job.over, actions) == (State.STOPPED, 75, True, [])


def test_done_beats_a_request_that_came_too_late() -> None:
    job, _ = after(RUNNING, (SIGTERM, 10), *ends(0, 0))
    assert (job.state, job.exit_code) == (State.DONE, 0)


def test_ranks_that_stop_unasked_are_stopped_all_the_same() -> None:
    job, _ = after(RUNNING, *ends(75, 75))
    assert (job.state, job.exit_code) == (State.STOPPED, 75)


def test_past_the_grace_time_stacks_are_written_and_ranks_killed() -> None:
    job, actions = after(RUNNING, (CTRL_C, 10), (RankEnded(0, 75), 20), (Tick(), 70))
    assert (job.state, job.exit_code) == (State.FAILED, 1)
    assert actions == [Action.ASK_STOP, Action.DUMP_STACKS]
    assert job.failure is not None
    assert job.failure.startswith("rank 1 did not finish the step")
    job, actions = after(job, (Tick(), 70 + DUMP_S / 2))
    assert not actions
    job, actions = after(job, (Tick(), 70 + DUMP_S), (Tick(), 72), (RankEnded(1, KILLED), 72))
    assert actions == [Action.KILL]
    assert job.over
    assert job.exit_code == 1


def test_a_second_ctrl_c_stops_at_once() -> None:
    job, actions = after(RUNNING, (CTRL_C, 10), (CTRL_C, 10 + DEBOUNCE_S))
    assert actions == [Action.ASK_STOP, Action.KILL]
    job, actions = after(job, (CTRL_C, 11), *ends(KILLED, KILLED))
    assert (job.state, job.exit_code, job.over, actions) == (State.STOPPED, 130, True, [])


@pytest.mark.parametrize(
    "second", [(CTRL_C, 10 + DEBOUNCE_S / 2), (SIGTERM, 30)], ids=["same keypress", "scheduler"]
)
def test_some_second_requests_do_not_insist(second: tuple[Event, float]) -> None:
    job, actions = after(RUNNING, (CTRL_C, 10), second)
    assert job.state is State.STOPPING
    assert actions == [Action.ASK_STOP]


def test_asked_before_ranks_run_they_are_ended_as_there_is_nothing_to_save() -> None:
    job, actions = after(NEW, (RankStarted(0), 1), (CTRL_C, 2))
    assert actions == [Action.KILL]
    job, _ = after(job, *ends(KILLED, KILLED))
    assert (job.state, job.exit_code, job.over) == (State.STOPPED, 75, True)


def test_the_first_failure_ends_the_run_after_a_moment() -> None:
    job, actions = after(RUNNING, (RankFailed(1, lost_peer=False), 10), (Tick(), 10.1))
    assert (job.state, job.exit_code, actions) == (State.FAILED, 1, [])
    job, actions = after(job, (Tick(), 10 + SETTLE_S), (Tick(), 11))
    assert actions == [Action.KILL]
    job, _ = after(job, *ends(KILLED, 1))
    assert job.over


def test_a_lost_peer_waits_longer_for_the_one_that_caused_it() -> None:
    job, actions = after(RUNNING, (RankFailed(1, lost_peer=True), 10), (Tick(), 11))
    assert not actions
    _, actions = after(job, (Tick(), 10 + SETTLE_LOST_PEER_S))
    assert actions == [Action.KILL]
    _, actions = after(job, (RankEnded(0, KILLED), 11), (Tick(), 11 + SETTLE_S))
    assert actions == [Action.KILL]


def test_a_failure_while_stopping_is_a_failure() -> None:
    job, _ = after(RUNNING, (CTRL_C, 10), (RankEnded(0, 75), 11), (RankEnded(1, 1), 12))
    assert (job.state, job.exit_code, job.over) == (State.FAILED, 1, True)


def test_ctrl_c_while_failing_does_not_wait() -> None:
    _, actions = after(RUNNING, (RankFailed(1, lost_peer=True), 10), (CTRL_C, 10.1), (CTRL_C, 11))
    assert actions == [Action.KILL]


def test_ranks_that_do_not_start_in_time_are_a_failure() -> None:
    job, actions = after(NEW, (RankStarted(0), 1), (Tick(), 100))
    assert job.failure == "rank 1 did not start in time"
    assert (job.state, actions) == (State.FAILED, [Action.KILL])


def test_a_broken_launcher_is_a_failure_unless_all_is_decided() -> None:
    job, actions = after(RUNNING, (LauncherBroke("it is gone"), 1))
    assert (job.state, job.failure, actions) == (State.FAILED, "it is gone", [Action.KILL])
    job, _ = after(RUNNING, *ends(0, 0), (LauncherBroke("late"), 60))
    assert (job.state, job.failure) == (State.DONE, None)


def test_ranks_that_cannot_be_killed_are_given_up() -> None:
    job, _ = after(RUNNING, (CTRL_C, 10), (CTRL_C, 20), (RankEnded(0, KILLED), 21))
    job, _ = after(job, (Tick(), 20 + UNKILLABLE_S))
    assert job.over
    assert job.failure is not None
    assert job.failure.startswith("rank 1 cannot be killed")


@pytest.mark.parametrize(
    ("ranks", "text"),
    [((2,), "rank 2"), ((1, 0), "ranks 0-1"), ((0, 1, 2, 5, 7, 8), "ranks 0-2, 5, 7-8")],
)
def test_names_of_ranks_are_short(ranks: tuple[int, ...], text: str) -> None:
    assert name_ranks(ranks) == text
