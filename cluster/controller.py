"""The controller of a run: feeds what happens to ``transition`` and executes what it decides.

Ranks that were killed are started again, each time from what was saved last (``lifecycle.py``).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from everstep.checkpoint.errors import EverstepError
from everstep.cluster import exit_codes
from everstep.cluster.causes import error_lost_peer, exit_lost_peer, first_cause
from everstep.cluster.closing import Outcome, restart_line
from everstep.cluster.driver import (
    Broken,
    ClusterDriver,
    Placement,
    PlacingAbandoned,
    RankExit,
    Reported,
)
from everstep.cluster.lifecycle import (
    ENDINGS,
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
from everstep.cluster.log_tail import LogTail
from everstep.cluster.stop_signals import StopSignals
from everstep.trainer.events import TOO_FREQUENT, EventLog
from everstep.trainer.progress import ProgressView
from everstep.trainer.rank_spec import RankSpec, Report

_POLL_S = 0.1
_LOGS_EVERY_S = 0.3
_AT_ONCE_S = 2.0


class Controller:
    """Runs the ranks of a run to their end.

    Args:
        driver: where they run.
        job: the run, about to start.
        signals: entered; asks to stop are taken from it.
        drill_kill_step: once this step has been done, kill all ranks, once; 0 = never.
    """

    def __init__(
        self,
        driver: ClusterDriver,
        job: Job,
        *,
        view: ProgressView,
        events: EventLog,
        tail: LogTail,
        signals: StopSignals,
        drill_kill_step: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._driver = driver
        self._job = job
        self._view = view
        self._events = events
        self._tail = tail
        self._signals = signals
        self._drill_kill_step = drill_kill_step
        self._clock = clock
        self._start_within_s = job.start_by_s - clock()
        self._specs_for: Callable[[Placement], Sequence[RankSpec]] = lambda placement: []
        self._errors: list[Report] = []
        self._exits: list[RankExit] = []
        self._messages: set[str] = set()
        self._step: int | None = None
        self._saved_step: int | None = None
        self._sealed_step: int | None = None
        self._logs_at_s = float("-inf")

    def run(self, specs_for: Callable[[Placement], Sequence[RankSpec]]) -> Outcome:
        """Place and start the ranks, and watch them until none is left. Raises LaunchError."""
        self._specs_for = specs_for
        try:
            placement = self._driver.place(self._job.world_size, self._waiting)
            self._note_placement(placement)
            self._driver.start(specs_for(placement))
            self._job = replace(self._job, start_by_s=self._clock() + self._start_within_s)
            self._view.status(f"starting {self._job.world_size} ranks")
            while not self._job.over:
                for asked in self._signals.take():
                    self._happen(asked)
                for event in self._driver.poll(_POLL_S):
                    self._hear(event)
                self._happen(Tick())
                self._show_logs()
                self._view.refresh(self._clock())
            self._end_keepers()
        except PlacingAbandoned:
            pass  # nothing has begun; the job says how it ends
        finally:
            self._driver.close()
        self._show_logs(rest=True)
        return self._outcome()

    def _note_placement(self, placement: Placement) -> None:
        self._events.append(
            "placement",
            store=placement.store,
            device=placement.device,
            seats=[asdict(seat) for seat in placement.seats],
        )

    def _start_again(self) -> None:
        """Start all ranks once more, where no rank is left of the attempt before."""
        job = self._job
        # What others raised when a rank was killed followed from that.
        raised = job.raised if job.died else frozenset()
        cause = first_cause(
            [error for error in self._errors if error["rank"] not in raised],
            [ended for ended in self._exits if ended.rank not in raised],
        )
        line = restart_line(cause, job.world_size, job.restarts, job.max_restarts)
        self._view.line(line)
        attempt = job.attempt + 1
        self._events.append("restart", attempt=attempt, restart=job.restarts, reason=line)
        try:
            placement = self._driver.renew(self._waiting)
            self._note_placement(placement)
            specs = [
                replace(spec, attempt=attempt, resume=self._resume_again(spec.resume))
                for spec in self._specs_for(placement)
            ]
            self._errors, self._exits = [], []
            self._driver.start(specs)
        except EverstepError as error:
            self._happen(LauncherBroke(str(error)))
            return
        self._happen(Restarted(self._clock() + self._start_within_s))
        self._view.status(f"starting {job.world_size} ranks again")

    def _end_keepers(self) -> None:
        """After a run that failed they stay, if they hold anything for the next start."""
        job = self._job
        if job.state is State.FAILED and self._sealed_step is not None:
            return
        at_once = job.exit_code == exit_codes.INTERRUPTED
        # Ranks that ended by themselves have made their last step durable.
        now = job.state is not State.STOPPED or (job.killed_at_s is None and not job.died)
        limit_s = _AT_ONCE_S if at_once else job.grace_s
        problems = self._driver.end_keepers(limit_s, now=now)
        for problem in [] if at_once else problems:  # it ends by itself when all is durable
            self._view.line(f"warning: {problem}")

    def _resume_again(self, resume: str) -> str:
        """What to resume from: as asked for the first time, until this run has states of its own.

        'never' holds where nothing was saved before, which ranks that trained have found out.
        """
        if self._saved_step is not None or self._sealed_step is not None:
            return "auto"
        if resume == "never" and self._step is not None:
            return "auto"
        return resume

    def _waiting(self, text: str) -> None:
        self._view.announce(text)
        for asked in self._signals.take():
            self._happen(asked)
        self._view.refresh(self._clock())
        if self._job.state in ENDINGS:
            raise PlacingAbandoned

    def _hear(self, event: Reported | RankExit | Broken) -> None:
        match event:
            case Reported(rank, report):
                self._take_in(rank, report)
            case RankExit(rank=rank, code=code, incurable=incurable):
                if self._job.killed_at_s is None:
                    self._exits.append(event)
                lost_peer = exit_lost_peer(code) or any(
                    error["rank"] == rank and error_lost_peer(error["type"], error["message"])
                    for error in self._errors
                )
                self._happen(RankEnded(rank, code, lost_peer, incurable))
            case Broken(why):
                self._happen(LauncherBroke(why))

    def _take_in(self, rank: int, report: Report) -> None:
        kind = report["kind"]
        if kind not in TOO_FREQUENT:
            self._events.append(**{**report, "rank": rank})
        if kind == "started":
            self._happen(RankStarted(rank))
        elif kind == "error":
            self._errors.append({**report, "rank": rank})
            lost_peer = error_lost_peer(report["type"], report["message"])
            self._happen(RankFailed(rank, lost_peer))
        elif kind == "message":
            self._show_message(rank, report)
        elif rank == 0:
            if kind == "step":
                self._step = report["step"]
                self._sealed_step = report.get("sealed")
                self._drill(report["step"])
            elif kind == "saved":
                self._saved_step = report["step"]
            self._view.show(report, self._clock())

    def _drill(self, step: int) -> None:
        if step != self._drill_kill_step:
            return
        self._drill_kill_step = 0
        self._events.append("drill", step=step)
        self._view.line(
            f"drill: step {step} is done, and all ranks get killed (launch.drill_kill_step)"
        )
        self._driver.kill()

    def _show_message(self, rank: int, report: Report) -> None:
        """Every message of rank 0, and what only others say."""
        text = str(report["text"])
        if rank == 0:
            self._view.line(text)
        elif text not in self._messages:
            self._view.line(f"[rank {rank}] {text}")
        self._messages.add(text)

    def _happen(self, event: Event) -> None:
        before = self._job.state
        decided = transition(self._job, event, self._clock())
        self._job = decided.job
        if decided.reason:
            self._events.append("state", state=self._job.state.value, reason=decided.reason)
        for action in decided.actions:
            self._events.append("action", action=action.name.lower())
            if action is Action.ASK_STOP:
                self._driver.ask_stop()
            elif action is Action.DUMP_STACKS:
                self._driver.dump_stacks()
            elif action is Action.KILL:
                self._driver.kill()
            else:
                self._start_again()
        if self._job.state is State.RUNNING and before is State.STARTING:
            self._view.status("preparing the first step")
        elif self._job.state is State.STOPPING and before is not State.STOPPING:
            line = f"{decided.reason}, in at most {self._job.grace_s:g} s"
            if isinstance(event, StopAsked) and event.insistent:
                line += f"; {event.by} again stops at once"
            self._view.line(line)

    def _show_logs(self, *, rest: bool = False) -> None:
        now_s = self._clock()
        if rest or now_s >= self._logs_at_s:
            self._logs_at_s = now_s + _LOGS_EVERY_S
            for line in self._tail.take(now_s, rest=rest):
                self._view.line(line)

    def _outcome(self) -> Outcome:
        job = self._job
        assert job.exit_code is not None
        cause = None
        exit_code = job.exit_code
        if job.state is State.FAILED and job.failure is None:
            cause = first_cause(self._errors, self._exits)
            exit_code = cause.exit_code if cause else exit_code
        return Outcome(
            exit_code=exit_code,
            failure=job.failure,
            cause=cause,
            not_again=job.not_again,
            step=self._step,
            saved_step=self._saved_step,
            sealed_step=self._sealed_step,
        )
