"""The controller of a run: feeds what happens to ``transition`` and executes what it decides.

Ranks that were killed are started again, each time from what was saved last (``lifecycle.py``).
"""

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from everstep.checkpoint.errors import EverstepError
from everstep.cluster import exit_codes
from everstep.cluster.causes import error_lost_peer, exit_lost_peer, first_cause
from everstep.cluster.closing import Outcome, closing_lines, restart_line
from everstep.cluster.driver import (
    Broken,
    ClusterDriver,
    Placement,
    PlacingAbandoned,
    RankExit,
    Reported,
)
from everstep.cluster.keepers import base_job, keeper_names, keeper_options
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
from everstep.cluster.local_driver import DEFAULT_PRELOAD, DEFAULT_TARGET, LocalDriver
from everstep.cluster.log_tail import BEFORE_RANKS, LogTail
from everstep.cluster.run_dir import RunDir, prepare_run_dir
from everstep.cluster.stop_signals import StopSignals
from everstep.trainer.commands import RESUBMIT_VARIABLE, resume_command
from everstep.trainer.config import RunConfig
from everstep.trainer.config_load import dump_config
from everstep.trainer.events import TOO_FREQUENT, EventLog
from everstep.trainer.mesh_shape import resolve_mesh
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
        if self._job.state is State.FAILED and self._sealed_step is not None:
            return
        at_once = self._job.exit_code == exit_codes.INTERRUPTED
        problems = self._driver.end_keepers(_AT_ONCE_S if at_once else self._job.grace_s)
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


def run_controlled(
    config: RunConfig,
    run_dir: Path,
    resume: str,
    world_size: int,
    console: Console,
    open_driver: Callable[[RunDir], ClusterDriver],
    *,
    error_console: Console | None = None,
    launch: Sequence[str] = (),
) -> int:
    """Run all ranks where ``open_driver`` puts them; returns the exit code (``exit_codes.py``).

    What goes wrong is told on ``error_console`` (default: standard error) in one sentence.
    ``launch`` are options that suggested commands repeat.
    """
    errors = error_console or Console(stderr=True)
    try:
        with (
            StopSignals() as signals,
            prepare_run_dir(run_dir, dump_config(config)) as prepared,
            EventLog(prepared.events) as events,
        ):
            driver = open_driver(prepared)
            with ProgressView(console, config.name) as view:
                view.line(headline(config, world_size, run_dir))
                controller = Controller(
                    driver,
                    Job(
                        world_size=world_size,
                        grace_s=config.train.grace_s,
                        start_by_s=time.monotonic() + config.parallel.timeout_s,
                        max_restarts=config.launch.max_restarts,
                    ),
                    view=view,
                    events=events,
                    tail=LogTail(_logs_to_follow(prepared, world_size), world_size),
                    signals=signals,
                    drill_kill_step=config.launch.drill_kill_step,
                )
                outcome = controller.run(
                    lambda placement: rank_specs(config, prepared, resume, placement, launch)
                )
            events.append("end", exit_code=outcome.exit_code, saved_step=outcome.saved_step)
            again = resume_command(
                run_dir, world_size, launch=launch, submitted=os.environ.get(RESUBMIT_VARIABLE)
            )
            kept_s = config.checkpoint.keeper_linger_s
            if config.checkpoint.memory != "keeper":
                kept_s = 0.0
            _tell(outcome, view, errors, prepared, events, world_size, again, kept_s)
            return outcome.exit_code
    except EverstepError as error:
        say(errors, f"error: {error}")
        return exit_codes.of_error(type(error).__name__)


def run_local(
    config: RunConfig,
    run_dir: Path,
    resume: str,
    world_size: int,
    console: Console,
    *,
    error_console: Console | None = None,
    target: str = DEFAULT_TARGET,
    preload: Sequence[str] = DEFAULT_PRELOAD,
    store: bool = True,
    launch: Sequence[str] = (),
) -> int:
    """Run all ranks as processes of this host, and return the exit code.

    Tests choose another ``target`` for the ranks, and do without ``preload`` and ``store``.
    """

    def open_driver(prepared: RunDir) -> ClusterDriver:
        return LocalDriver(
            prepared.logs,
            target=target,
            preload=preload,
            store_port=config.launch.port if store else None,
            threads=config.parallel.threads,
            inherit_fds=[prepared.lock.fileno()],
            keep=keeper_options(config).keep,
        )

    return run_controlled(
        config,
        run_dir,
        resume,
        world_size,
        console,
        open_driver,
        error_console=error_console,
        launch=launch,
    )


def rank_specs(
    config: RunConfig,
    run_dir: RunDir,
    resume: str,
    placement: Placement,
    launch: Sequence[str] = (),
) -> list[RankSpec]:
    """What each rank of the first attempt is told."""
    config_yaml = dump_config(config)
    keepers = keeper_names(base_job(config, run_dir.path), placement.seats)
    return [
        RankSpec(
            config_yaml=config_yaml,
            run_dir=str(run_dir.path),
            rank=rank,
            world_size=len(placement.seats),
            local_rank=seat.local_rank,
            local_world_size=seat.local_world_size,
            attempt=0,
            resume=resume,
            store=placement.store,
            keeper=keepers[rank],
            device=placement.device,
            launch=launch,
        )
        for rank, seat in enumerate(placement.seats)
    ]


def headline(config: RunConfig, world_size: int, run_dir: Path) -> str:
    """What is run, on what, and where it is written. Raises ConfigError."""
    mesh = resolve_mesh(config.mesh, world_size)
    ranks = f"{world_size} ranks ({mesh})" if world_size > 1 else str(mesh)
    return f"{config.name}: {config.train.steps} steps on {ranks}, in {run_dir}"


def say(console: Console, text: str) -> None:
    """Print plain text as it is, to a console that may be gone."""
    with contextlib.suppress(OSError, SystemExit):
        console.print(Text(text), soft_wrap=True)


def _logs_to_follow(run_dir: RunDir, world_size: int) -> dict[int, Path]:
    logs = {rank: run_dir.rank_log(rank) for rank in range(world_size)}
    return {BEFORE_RANKS: run_dir.start_log, **logs}


def _tell(
    outcome: Outcome,
    view: ProgressView,
    errors: Console,
    run_dir: RunDir,
    events: EventLog,
    world_size: int,
    again: str,
    kept_s: float,
) -> None:
    for line in closing_lines(outcome, run_dir.logs, world_size, again, kept_s=kept_s):
        if line.is_error:
            say(errors, line.text)
        else:
            view.line(line.text)
    if outcome.exit_code == exit_codes.DONE:
        view.show_summary()
    if events.failure is not None:
        say(errors, f"warning: {events.failure}")
