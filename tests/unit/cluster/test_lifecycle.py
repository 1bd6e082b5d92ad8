import signal
from dataclasses import replace

import pytest

from everstep.cluster.lifecycle import (
    DEBOUNCE_S,
    DUMP_S,
    FORGIVEN_S,
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
    Restarted,
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


def when(event: tuple[Event, float]) -> float:
    return event[1]


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
    assert (job.state, job.exit_code, actions) == (State.FAILING, None, [])
    job, actions = after(job, (Tick(), 10 + SETTLE_S), (Tick(), 11))
    assert actions == [Action.KILL]
    job, _ = after(job, *ends(KILLED, 1))
    assert (job.state, job.exit_code, job.over) == (State.FAILED, 1, True)


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


TRYING = replace(RUNNING, max_restarts=3, running_since_s=5)
ONE_DIED = (RankEnded(1, KILLED), 10.0)


def test_killed_ranks_are_started_again_when_all_are_gone() -> None:
    job, actions = after(TRYING, ONE_DIED, (Tick(), 10 + SETTLE_S))
    assert (job.state, actions) == (State.FAILING, [Action.KILL])
    job, actions = after(job, (RankEnded(0, KILLED), 11))
    assert (job.state, actions, job.left, job.over) == (
        State.RESTARTING,
        [Action.START_AGAIN],
        (),
        False,
    )
    job, _ = after(job, (Tick(), 12), (Restarted(start_by_s=200), 13))
    assert (job.state, job.attempt, job.restarts) == (State.STARTING, 1, 1)
    assert (job.left, job.start_by_s) == ((0, 1), 200)
    job, _ = after(job, (RankStarted(0), 14), (RankStarted(1), 15), *ends(0, 0))
    assert (job.state, job.exit_code, job.over) == (State.DONE, 0, True)


def test_ranks_that_die_together_start_again_at_once() -> None:
    _, actions = after(TRYING, *ends(KILLED, KILLED))
    assert actions == [Action.START_AGAIN]


def test_a_rank_killed_before_all_have_started_counts_too() -> None:
    starting = replace(NEW, max_restarts=1)
    job, actions = after(starting, (RankStarted(1), 1), *ends(KILLED, KILLED))
    assert (job.state, actions) == (State.RESTARTING, [Action.START_AGAIN])


@pytest.mark.parametrize(
    "more",
    [
        [(RankFailed(0, lost_peer=True), 9.9)],
        [(RankFailed(0, lost_peer=False), 10.1)],
        [(RankFailed(0, lost_peer=False), 9.9)],
    ],
    ids=["lost peer", "an error that followed", "an error that was told first"],
)
def test_what_others_raise_when_a_rank_is_killed_changes_nothing(
    more: list[tuple[Event, float]],
) -> None:
    events = sorted([ONE_DIED, *more, (RankEnded(0, 1, more[0][0].lost_peer), 10.2)], key=when)
    _, actions = after(TRYING, *events)
    assert actions == [Action.START_AGAIN]


def test_ranks_that_only_lost_each_other_start_again() -> None:
    lost: list[tuple[Event, float]] = [(RankFailed(rank, lost_peer=True), 10) for rank in (0, 1)]
    gone: list[tuple[Event, float]] = [(RankEnded(rank, 1, lost_peer=True), 11) for rank in (0, 1)]
    _, actions = after(TRYING, *lost, *gone)
    assert actions == [Action.START_AGAIN]


@pytest.mark.parametrize(
    "events",
    [
        [(RankFailed(1, lost_peer=False), 10), (RankEnded(1, 1), 10), (RankEnded(0, -6, True), 10)],
        [(RankEnded(1, 3), 10), (RankEnded(0, 1, lost_peer=True), 10)],
        [(RankEnded(1, KILLED, incurable=True), 10), (RankEnded(0, 1, lost_peer=True), 10)],
        [(RankFailed(1, lost_peer=False), 10), (RankEnded(1, -11), 10), (RankEnded(0, 75), 10)],
    ],
    ids=["raised", "exit code", "cannot be started", "crashed while it failed"],
)
def test_what_a_rank_raised_itself_is_not_tried_again(events: list[tuple[Event, float]]) -> None:
    job, actions = after(TRYING, *events)
    assert (job.state, job.exit_code, job.over, actions) == (State.FAILED, 1, True, [])
    assert job.not_again == "an error that a rank raised itself would come again"


def test_ranks_that_were_killed_by_us_prove_nothing() -> None:
    job, actions = after(
        TRYING, (RankFailed(1, False), 10), (Tick(), 11), *ends(KILLED, KILLED, now_s=12)
    )
    assert (job.state, actions) == (State.FAILED, [Action.KILL])


def test_restarts_in_a_row_end_at_some_time() -> None:
    job = TRYING
    for restart in (1, 2, 3):
        job, actions = after(job, *ends(KILLED, KILLED))
        assert (job.restarts, actions) == (restart, [Action.START_AGAIN])
        job, _ = after(job, (Restarted(99), 60), (RankStarted(0), 61), (RankStarted(1), 62))
    job, actions = after(job, *ends(KILLED, KILLED, now_s=62 + FORGIVEN_S - 1))
    assert (job.state, job.exit_code, actions) == (State.FAILED, 1, [])
    assert job.not_again == "launch.max_restarts=3, and ranks failed again after each restart"


def test_a_restart_after_ten_minutes_of_running_is_the_first_of_a_new_row() -> None:
    job, actions = after(replace(TRYING, restarts=3), *ends(KILLED, KILLED, now_s=5 + FORGIVEN_S))
    assert (job.restarts, actions) == (1, [Action.START_AGAIN])


@pytest.mark.parametrize("events", [[ONE_DIED, (SIGTERM, 10.1)], [(CTRL_C, 9.0), ONE_DIED]])
def test_who_asks_to_stop_gets_no_restart(events: list[tuple[Event, float]]) -> None:
    job, _ = after(TRYING, *events, (RankEnded(0, 1, lost_peer=True), 11))
    assert job.over
    asked_first = events[0][0] is CTRL_C
    assert job.exit_code == (1 if asked_first else 75)


@pytest.mark.parametrize("started", [False, True])
def test_asked_to_stop_during_a_restart(started: bool) -> None:
    job, _ = after(TRYING, *ends(KILLED, KILLED))
    if started:
        job, _ = after(job, (Restarted(200), 51))
    job, actions = after(job, (CTRL_C, 52))
    assert (job.state, job.exit_code) == (State.STOPPED, 75)
    assert (job.over, actions) == ((False, [Action.KILL]) if started else (True, []))


def test_a_place_that_cannot_be_had_again_ends_the_run() -> None:
    job, _ = after(TRYING, *ends(KILLED, KILLED), (LauncherBroke("too small"), 51))
    assert (job.state, job.failure, job.over) == (State.FAILED, "too small", True)


def test_ranks_that_fail_and_cannot_be_killed_are_not_started_again() -> None:
    job, _ = after(TRYING, ONE_DIED, (Tick(), 11), (Tick(), 11 + UNKILLABLE_S))
    assert (job.state, job.exit_code, job.over) == (State.FAILED, 1, True)


@pytest.mark.parametrize(
    ("ranks", "text"),
    [((2,), "rank 2"), ((1, 0), "ranks 0-1"), ((0, 1, 2, 5, 7, 8), "ranks 0-2, 5, 7-8")],
)
def test_names_of_ranks_are_short(ranks: tuple[int, ...], text: str) -> None:
    assert name_ranks(ranks) == text
