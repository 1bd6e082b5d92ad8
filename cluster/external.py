"""One rank under somebody else's launcher (torchrun, srun): this process is the rank.

Rank 0 prepares and locks the run directory, and shows progress; every rank tells its own error,
once, and leaves the full trace in its log.
"""

import faulthandler
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Mapping, MutableMapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from everstep.checkpoint.errors import EverstepError
from everstep.cluster import exit_codes, host, slurm
from everstep.cluster.causes import error_lost_peer, first_cause
from everstep.cluster.closing import Outcome, closing_lines
from everstep.cluster.errors import RankEnvironmentError
from everstep.cluster.keepers import base_job, keeper_runs
from everstep.cluster.lifecycle import Action, Event, Job, RankStarted, Tick, transition
from everstep.cluster.local_driver import DEFAULT_TARGET, rank_log
from everstep.cluster.log_text import framed_trace
from everstep.cluster.run import headline, say
from everstep.cluster.run_dir import prepare_run_dir
from everstep.cluster.stop_signals import StopSignals, stop_asked
from everstep.cluster.worker_shell import work
from everstep.trainer.config import RunConfig
from everstep.trainer.config_load import dump_config
from everstep.trainer.events import TOO_FREQUENT, EventLog
from everstep.trainer.progress import ProgressView
from everstep.trainer.rank_spec import RankSpec, Report

_WATCH_S = 0.2
_DEBOUNCE_S = 1.0
"""torchrun sends its ranks the interrupt that they have from the terminal already, when it can."""


def run_external(
    config: RunConfig,
    run_dir: Path,
    resume: str,
    console: Console,
    *,
    error_console: Console | None = None,
    environment: MutableMapping[str, str] = os.environ,
    target: str = DEFAULT_TARGET,
) -> int:
    """Be the rank that the environment says, and return the exit code (``exit_codes.py``)."""
    errors = error_console or Console(stderr=True)
    try:
        spec = rank_spec(environment, dump_config(config), run_dir, resume)
        base = base_job(config, run_dir)
        if base is not None and keeper_runs(base):
            spec = replace(spec, keeper=base)
        environment.update(library_environment(environment, config.parallel.threads))
        with ExitStack() as stack:
            shown = _Shown(spec, errors)
            if spec.rank == 0:
                prepared = stack.enter_context(prepare_run_dir(run_dir, spec.config_yaml))
                shown.events = stack.enter_context(EventLog(prepared.events))
                shown.view = stack.enter_context(ProgressView(console, config.name, live=False))
                shown.view.line(headline(config, spec.world_size, run_dir))
                if base is not None and spec.keeper is None:
                    shown.view.line(
                        "snapshots end with the ranks, as no keeper runs on this node: start one "
                        f"on each first, with: everstep keeper start --job {base}"
                    )
            watch = stack.enter_context(_Watch(config.train.grace_s, shown))
            code = work(target, spec, shown.report, watch.should_stop, shown.write_trace, shown.log)
        return shown.finish(code)
    except EverstepError as error:
        say(errors, f"error: {error}")
        return exit_codes.of_error(type(error).__name__)


def rank_spec(
    environment: Mapping[str, str], config_yaml: str, run_dir: Path, resume: str
) -> RankSpec:
    """Which rank this process is, by the variables of torchrun or else of srun.

    Raises RankEnvironmentError where a variable is missing or no number.
    """
    known = {**slurm.torch_environment(environment), **environment}
    world_size = _number(known, "WORLD_SIZE")
    restarts = known.get("TORCHELASTIC_RESTART_COUNT") or known.get("SLURM_RESTART_COUNT") or "0"
    return RankSpec(
        config_yaml=config_yaml,
        run_dir=str(run_dir),
        rank=_number(known, "RANK"),
        world_size=world_size,
        local_rank=_number(known, "LOCAL_RANK"),
        local_world_size=_number(
            {"LOCAL_WORLD_SIZE": str(world_size), **known}, "LOCAL_WORLD_SIZE"
        ),
        attempt=int(restarts) if restarts.isdigit() else 0,
        resume=resume,
        store=None,
    )


def library_environment(environment: Mapping[str, str], threads: int | str) -> dict[str, str]:
    """Variables that libraries need and the launcher did not set, before torch is imported."""
    known = {**slurm.torch_environment(environment), **environment}
    if isinstance(threads, int):
        known["OMP_NUM_THREADS"] = str(threads)
    elif "OMP_NUM_THREADS" not in known:
        ranks = int(known.get("LOCAL_WORLD_SIZE", "1"))
        known["OMP_NUM_THREADS"] = str(
            host.threads_per_rank(threads, host.available_cores(), ranks)
        )
    return {name: value for name, value in known.items() if environment.get(name) != value}


def _number(known: Mapping[str, str], name: str) -> int:
    value = known.get(name)
    if value is None or not value.isdigit():
        raise RankEnvironmentError(name, value)
    return int(value)


class _Shown:
    """What this rank shows and writes: progress and events on rank 0, its own error on any."""

    def __init__(self, spec: RankSpec, errors: Console) -> None:
        self._spec = spec
        self._errors = errors
        self._error: Report | None = None
        self._saved_step: int | None = None
        self._log = rank_log(Path(spec.run_dir) / "logs", spec.rank)
        self.view: ProgressView | None = None
        self.events: EventLog | None = None

    @property
    def log(self) -> str:
        """File that traces go to."""
        return str(self._log)

    def report(self, report: Report) -> None:
        """Show a report of this rank; never raises."""
        report = {**report, "rank": self._spec.rank}
        if report["kind"] == "error":
            self._error = report
        elif report["kind"] == "saved":
            self._saved_step = report["step"]
        if self.events is not None and report["kind"] not in TOO_FREQUENT:
            self.events.append(**report)
        if self.view is not None:
            self.view.show(report, time.monotonic())

    def note(self, reason: str) -> None:
        """Something was decided about this rank."""
        if self.events is not None:
            self.events.append("state", reason=reason)
        if self.view is not None:
            self.view.line(reason)

    def write_trace(self, error: BaseException) -> None:
        """The full trace of an error goes to this rank's log."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("a", encoding="utf-8") as log:
            log.write(framed_trace(error))

    def dump_stacks(self) -> None:
        """The stacks of all threads go to this rank's log."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("a", encoding="utf-8") as log:
            faulthandler.dump_traceback(log, all_threads=True)

    def tell(self, sentence: str) -> None:
        """Print an error."""
        say(self._errors, f"error: {sentence}")

    def finish(self, code: int) -> int:
        """Say how it ended; the exit code of this process."""
        if self._error is None:
            if self.view is not None:
                outcome = Outcome(exit_code=code, saved_step=self._saved_step)
                again = "start the same command again"
                logs, ranks = self._log.parent, self._spec.world_size
                for line in closing_lines(outcome, logs, ranks, again):
                    self.view.line(line.text)
                self.view.show_summary()
            return code
        cause = first_cause([self._error], [])
        assert cause is not None
        if error_lost_peer(self._error["type"], self._error["message"]):
            self.tell(f"rank {cause.rank} lost another rank (trace: {self.log})")
        else:
            who = "" if cause.sentence.startswith("rank ") else f"rank {cause.rank}, "
            self.tell(f"{cause.sentence} ({who}full trace: {self.log})")
        return cause.exit_code


class _Watch:
    """Turns signals into ``should_stop``, and ends the process when it does not stop by itself.

    A thread does it: Python's own handlers do not run while the main thread waits in native code.
    """

    def __init__(self, grace_s: float, shown: _Shown) -> None:
        self._shown = shown
        self._job = Job(
            world_size=1, grace_s=grace_s, start_by_s=float("inf"), debounce_s=_DEBOUNCE_S
        )
        self._stop = False
        self._signals = StopSignals()
        self._woken, self._wake = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="everstep-watch", daemon=True)

    def should_stop(self) -> bool:
        """True once somebody asked this rank to stop."""
        return self._stop

    def __enter__(self) -> "_Watch":
        self._happen(RankStarted(0))
        self._wake.setblocking(False)
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        self._signals.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._signals.__exit__(None, None, None)
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
        self._wake.close()
        self._thread.join()
        self._woken.close()

    def _watch(self) -> None:
        while True:
            readable, _, _ = select.select([self._woken], [], [], _WATCH_S)
            if readable:
                signals = self._woken.recv(64)
                if not signals:
                    return
                for signum in signals:
                    if signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                        self._happen(stop_asked(signum))
            self._happen(Tick())

    def _happen(self, event: Event) -> None:
        decided = transition(self._job, event, time.monotonic())
        self._job = decided.job
        for action in decided.actions:
            if action is Action.ASK_STOP:
                self._stop = True
                self._shown.note(decided.reason)
            elif action is Action.DUMP_STACKS:
                self._shown.dump_stacks()
            else:
                if self._job.failure is not None:
                    self._shown.tell(self._job.failure)
                os._exit(self._job.exit_code or exit_codes.FAILED)
