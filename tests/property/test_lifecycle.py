"""Whatever happens in whatever order: a run ends, once, and for good."""

import signal
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from everstep.cluster.lifecycle import (
    ENDINGS,
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
    transition,
)

WORLD_SIZE = 3
MAX_RESTARTS = 2
ranks = st.integers(0, WORLD_SIZE - 1)
happenings = st.one_of(
    st.builds(RankStarted, ranks),
    st.builds(RankFailed, ranks, st.booleans()),
    st.builds(RankEnded, ranks, st.sampled_from([0, 75, 1, -9, -6]), st.booleans(), st.booleans()),
    st.just(Restarted(start_by_s=1000.0)),
    st.builds(StopAsked, st.just("a signal"), st.booleans()),
    st.just(LauncherBroke("gone")),
    st.just(Tick()),
)
histories = st.lists(st.tuples(happenings, st.floats(0, 20)), max_size=40)


def step(job: Job, event: Event, now_s: float, done: Counter[Action]) -> Job:
    decided = transition(job, event, now_s)
    done.update(decided.actions)
    after = decided.job
    if after.attempt > job.attempt:
        # The only way to a new attempt: nothing was left of the old one.
        assert (job.state, job.left, after.state) == (State.RESTARTING, (), State.STARTING)
        done.clear()
    else:
        assert job.ended <= after.ended
    if job.state in ENDINGS:
        assert after.state is job.state
        assert after.exit_code == job.exit_code
    assert (after.state in ENDINGS) == (after.exit_code is not None)
    assert (after.state is not job.state) <= bool(decided.reason)
    assert done[Action.ASK_STOP] <= 1
    assert done[Action.KILL] <= 1
    assert done[Action.START_AGAIN] <= 1
    assert (Action.START_AGAIN in decided.actions) <= (not after.left)
    assert after.restarts <= MAX_RESTARTS
    return after


@given(histories)
def test_every_run_ends_once_and_for_good(history: list[tuple[Event, float]]) -> None:
    job = Job(world_size=WORLD_SIZE, grace_s=30, start_by_s=60, max_restarts=MAX_RESTARTS)
    done: Counter[Action] = Counter()
    now_s = 0.0
    for event, later_s in history:
        now_s += later_s
        job = step(job, event, now_s, done)
    # Somebody asks it to stop; ranks end only when they are killed.
    job = step(job, StopAsked("SIGTERM", insistent=False), now_s, done)
    for _ in range(10):
        now_s += 100
        job = step(job, Tick(), now_s, done)
        if done[Action.KILL]:
            break
    if job.left:
        assert done[Action.KILL] == 1
    for rank in job.left:
        job = step(job, RankEnded(rank, -signal.SIGKILL), now_s, done)
    assert job.over


@given(histories)
def test_a_run_whose_ranks_cannot_be_killed_ends_too(history: list[tuple[Event, float]]) -> None:
    job = Job(world_size=WORLD_SIZE, grace_s=30, start_by_s=60, max_restarts=MAX_RESTARTS)
    done: Counter[Action] = Counter()
    now_s = 0.0
    for event, later_s in history:
        now_s += later_s
        job = step(job, event, now_s, done)
    job = step(job, LauncherBroke("gone"), now_s, done)
    for _ in range(4):
        now_s += UNKILLABLE_S + 1
        job = step(job, Tick(), now_s, done)
    assert job.over
