"""When to do what with the ranks of a run: one pure function, ``transition``.

The controller feeds it what happened, with the clock passed in, and executes the actions that it
returns. Time is that of a monotonic clock, in seconds.

    STARTING ──all started──▶ RUNNING ──all done──▶ DONE
       ▲ │                      │ ──asked──▶ STOPPING ──all ended──▶ STOPPED
       │ └──── a rank failed ───┴───────────────┤
       │                                        ▼
    RESTARTING ◀──all gone, worth a try── FAILING ──all gone──▶ FAILED

DONE, STOPPED and FAILED say how the run ends; it is over when no rank is left as well. Starting
again is worth a try when a rank was killed, or ranks only lost each other: what a rank raised by
itself would come again.
"""

from dataclasses import dataclass, replace
from enum import Enum

from everstep.cluster import exit_codes

SETTLE_S = 0.5
"""After a rank failed on its own: time for others that failed with it to say so."""
SETTLE_LOST_PEER_S = 2.0
"""After a rank only lost its connection: time for the one that caused it to be noticed."""
DUMP_S = 0.5
"""Time to write stacks to the logs before ranks that hang are killed."""
DEBOUNCE_S = 0.25
"""Wrappers of the command forward an interrupt that the terminal has sent to all already."""
UNKILLABLE_S = 10.0
"""A killed rank that is still there after this is given up."""
FORGIVEN_S = 600.0
"""Restarts before ranks have run for so long count no longer."""


class State(Enum):
    """Where a run is."""

    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    FAILING = "failing"
    """A rank failed; when all are gone, they start again, or the run has failed."""
    RESTARTING = "restarting"
    """No rank is left, and all are about to start again."""
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"


ENDINGS = frozenset({State.DONE, State.STOPPED, State.FAILED})


class Action(Enum):
    """What the controller is to do now."""

    ASK_STOP = "ask all ranks to finish their step, save and end"
    DUMP_STACKS = "have all ranks write their stacks to their logs"
    KILL = "end all ranks at once"
    START_AGAIN = "start all ranks again, from what was saved last"


@dataclass(frozen=True)
class RankStarted:
    """The process of a rank is up."""

    rank: int


@dataclass(frozen=True)
class RankFailed:
    """A rank reported an error, or ended without having done its work."""

    rank: int
    lost_peer: bool
    """It only noticed that another rank is gone."""


@dataclass(frozen=True)
class RankEnded:
    """The process of a rank is gone."""

    rank: int
    code: int
    """Exit code; -N when signal N killed it."""
    lost_peer: bool = False
    """It may have ended only because another rank is gone."""
    incurable: bool = False
    """Started again, it would end in the same way."""


@dataclass(frozen=True)
class Restarted:
    """All ranks were started again, as RESTARTING asks for."""

    start_by_s: float
    """When all of them must have started."""


@dataclass(frozen=True)
class StopAsked:
    """Somebody wants the run to stop."""

    by: str
    """What they did: 'Ctrl-C', 'SIGTERM'."""
    insistent: bool
    """Asking this way again means: at once."""


@dataclass(frozen=True)
class LauncherBroke:
    """The driver can no longer run ranks."""

    why: str


@dataclass(frozen=True)
class Tick:
    """Time passed."""


Event = RankStarted | RankFailed | RankEnded | Restarted | StopAsked | LauncherBroke | Tick


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that is known about a run for the purpose of deciding."""

    world_size: int
    grace_s: float
    start_by_s: float
    """When all ranks must have started."""
    debounce_s: float = DEBOUNCE_S
    """Interrupts closer together than this are one."""
    max_restarts: int = 0
    """How often in a row ranks are started again."""
    attempt: int = 0
    """Counts the starts of all ranks, from 0."""
    restarts: int = 0
    """Restarts in a row; one after ``FORGIVEN_S`` of running is the first of a new row."""
    state: State = State.STARTING
    exit_code: int | None = None
    """Set with the ending."""
    failure: str | None = None
    """Why the run failed, where no rank failed on its own."""
    not_again: str | None = None
    """Why ranks that failed were not started again, where they might have been."""
    started: frozenset[int] = frozenset()
    ended: frozenset[int] = frozenset()
    stopped: frozenset[int] = frozenset()
    """Ranks that ended because they were asked to."""
    raised: frozenset[int] = frozenset()
    """Ranks that failed in a way that would come again."""
    died: frozenset[int] = frozenset()
    """Ranks that something killed."""
    running_since_s: float | None = None
    failing_since_s: float | None = None
    asked_at_s: float | None = None
    """When somebody first asked to stop."""
    kill_at_s: float | None = None
    """When ranks that are left will be killed."""
    killed_at_s: float | None = None

    @property
    def left(self) -> tuple[int, ...]:
        """Ranks whose processes are not gone."""
        return tuple(rank for rank in range(self.world_size) if rank not in self.ended)

    @property
    def over(self) -> bool:
        """How the run ends is decided, and nothing is left of it."""
        return self.state in ENDINGS and not self.left


@dataclass(frozen=True)
class Transition:
    """What follows from an event; ``reason`` is empty where the state stays."""

    job: Job
    actions: tuple[Action, ...] = ()
    reason: str = ""


def transition(job: Job, event: Event, now_s: float) -> Transition:
    """What follows for the job when ``event`` happens at ``now_s``."""
    match event:
        case RankStarted(rank):
            return _started(job, rank, now_s)
        case RankFailed(rank, lost_peer):
            if not lost_peer:
                job = _blame(job, rank)
            return _failed(job, f"rank {rank} reported an error", lost_peer, now_s)
        case RankEnded():
            return _ended(job, event, now_s)
        case Restarted(start_by_s):
            return _restarted(job, start_by_s)
        case StopAsked():
            return _asked(job, event, now_s)
        case LauncherBroke(why):
            if job.state in ENDINGS:
                return Transition(job)
            failed = _fail(job, why)
            ended = job.killed_at_s is not None or not job.left
            return Transition(failed, reason=why) if ended else _kill(failed, now_s, why)
        case Tick():
            return _tick(job, now_s)


def _started(job: Job, rank: int, now_s: float) -> Transition:
    job = replace(job, started=job.started | {rank})
    if job.state is not State.STARTING or len(job.started) < job.world_size:
        return Transition(job)
    running = replace(job, state=State.RUNNING, running_since_s=now_s)
    return Transition(running, reason=f"all {job.world_size} ranks run")


def _blame(job: Job, rank: int) -> Job:
    """A rank failed by itself; nothing that happens after ranks were ended says so."""
    if job.killed_at_s is not None:
        return job
    return replace(job, raised=job.raised | {rank}, died=job.died - {rank})


def _failed(job: Job, why: str, lost_peer: bool, now_s: float) -> Transition:
    """The first failure ends the attempt; ranks get a moment to say what they know about it."""
    kill_at_s = now_s + (SETTLE_LOST_PEER_S if lost_peer else SETTLE_S)
    if job.state is State.FAILING:
        if job.kill_at_s is None:
            return Transition(job)
        return Transition(replace(job, kill_at_s=min(job.kill_at_s, kill_at_s)))
    if job.state in ENDINGS or job.state is State.RESTARTING:
        return Transition(job)
    failing = replace(job, state=State.FAILING, kill_at_s=kill_at_s, failing_since_s=now_s)
    return Transition(failing, reason=why)


def _ended(job: Job, event: RankEnded, now_s: float) -> Transition:
    job, reason = replace(job, ended=job.ended | {event.rank}), ""
    if event.code == exit_codes.STOPPED:
        job = replace(job, stopped=job.stopped | {event.rank})
    elif event.code != exit_codes.DONE:
        if not event.lost_peer:
            job = _explain(job, event)
        decided = _failed(job, f"rank {event.rank} ended ({event.code})", event.lost_peer, now_s)
        job, reason = decided.job, decided.reason
    if job.state in ENDINGS or job.state is State.RESTARTING or job.left:
        return Transition(job, reason=reason)
    if job.state is State.FAILING:
        decided = _all_gone(job, now_s)
        return replace(decided, reason="; ".join(filter(None, (reason, decided.reason))))
    if job.stopped:
        ending = replace(job, state=State.STOPPED, exit_code=exit_codes.STOPPED)
        return Transition(ending, reason="all ranks stopped as asked")
    return Transition(replace(job, state=State.DONE, exit_code=exit_codes.DONE), reason="all done")


def _explain(job: Job, event: RankEnded) -> Job:
    """What the end of a rank proves: that it was killed, or that it failed by itself."""
    if event.code >= 0 or event.incurable:
        return _blame(job, event.rank)
    if job.killed_at_s is not None or event.rank in job.raised:
        return job
    return replace(job, died=job.died | {event.rank})


def _all_gone(job: Job, now_s: float) -> Transition:
    """Ranks have failed, and none is left: start again, or end."""
    forgiven = job.running_since_s is not None and now_s - job.running_since_s >= FORGIVEN_S
    restarts = 0 if forgiven else job.restarts
    not_again = None
    if job.raised and not job.died:
        not_again = "an error that a rank raised itself would come again"
    elif restarts >= job.max_restarts:
        not_again = (
            f"launch.max_restarts={job.max_restarts}, and ranks failed again after each restart"
        )
    if not_again is not None:
        told = not_again if job.max_restarts else None
        return Transition(replace(_fail(job, None), not_again=told), reason=not_again)
    if job.asked_at_s is None:
        again = replace(job, state=State.RESTARTING, restarts=restarts + 1)
        reason = f"restart {again.restarts} of {job.max_restarts}"
        return Transition(again, (Action.START_AGAIN,), reason)
    if job.failing_since_s is not None and job.asked_at_s >= job.failing_since_s:
        ending = replace(job, state=State.STOPPED, exit_code=exit_codes.STOPPED)
        return Transition(ending, reason="asked to stop instead of starting again")
    return Transition(_fail(job, None), reason="ranks failed while they were stopping")


def _restarted(job: Job, start_by_s: float) -> Transition:
    if job.state is not State.RESTARTING:
        return Transition(job)
    anew = Job(
        world_size=job.world_size,
        grace_s=job.grace_s,
        start_by_s=start_by_s,
        debounce_s=job.debounce_s,
        max_restarts=job.max_restarts,
        attempt=job.attempt + 1,
        restarts=job.restarts,
    )
    return Transition(anew, reason=f"attempt {anew.attempt} begins")


def _asked(job: Job, event: StopAsked, now_s: float) -> Transition:
    first = job.asked_at_s is None
    asked = replace(job, asked_at_s=now_s) if first else job
    if job.state is State.STARTING:
        ending = replace(asked, state=State.STOPPED, exit_code=exit_codes.STOPPED)
        return _kill(ending, now_s, f"{event.by} before the first step: there is nothing to save")
    if job.state is State.RESTARTING:
        ending = replace(asked, state=State.STOPPED, exit_code=exit_codes.STOPPED)
        return Transition(ending, reason=f"{event.by} instead of starting again")
    if job.state is State.RUNNING:
        stopping = replace(asked, state=State.STOPPING, kill_at_s=now_s + job.grace_s)
        return Transition(
            stopping, (Action.ASK_STOP,), f"{event.by}: finishing the step and saving"
        )
    again = job.asked_at_s is not None and now_s - job.asked_at_s >= job.debounce_s
    if job.state is State.STOPPING and event.insistent and again:
        ending = replace(job, state=State.STOPPED, exit_code=exit_codes.INTERRUPTED)
        return _kill(ending, now_s, f"{event.by} again: stop at once")
    failing = job.state in (State.FAILING, State.FAILED)
    if failing and event.insistent and job.killed_at_s is None:
        return _kill(asked, now_s)
    return Transition(asked)


def _tick(job: Job, now_s: float) -> Transition:
    if job.state is State.STARTING and now_s >= job.start_by_s:
        missing = [rank for rank in range(job.world_size) if rank not in job.started]
        why = f"{name_ranks(missing)} did not start in time"
        return _kill(_fail(job, why), now_s, why)
    if job.killed_at_s is not None:
        if job.left and now_s >= job.killed_at_s + UNKILLABLE_S:
            why = f"{name_ranks(job.left)} cannot be killed (waiting for a device?), given up"
            if job.state is State.FAILING:
                job = _fail(job, why)
            gone = frozenset(range(job.world_size))
            return Transition(replace(job, ended=gone, failure=job.failure or why), reason=why)
        return Transition(job)
    if job.kill_at_s is None or now_s < job.kill_at_s:
        return Transition(job)
    if job.state is State.STOPPING:
        why = (
            f"{name_ranks(job.left)} did not finish the step and save within "
            f"train.grace_s={job.grace_s:g} seconds, and had to be killed; raise train.grace_s "
            "if steps take that long (where they hung is in the logs)"
        )
        failed = replace(_fail(job, why), kill_at_s=now_s + DUMP_S)
        return Transition(failed, (Action.DUMP_STACKS,), why)
    return _kill(job, now_s)


def _fail(job: Job, why: str | None) -> Job:
    return replace(job, state=State.FAILED, exit_code=exit_codes.FAILED, failure=why)


def _kill(job: Job, now_s: float, reason: str = "") -> Transition:
    return Transition(replace(job, killed_at_s=now_s, kill_at_s=None), (Action.KILL,), reason)


def name_ranks(ranks: list[int] | tuple[int, ...]) -> str:
    """'rank 2', 'ranks 0, 1 and 3', 'ranks 0-3, 5': short however many there are."""
    runs: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"rank{'s' if len(set(ranks)) != 1 else ''} {', '.join(parts)}"
