"""One run under a controller, from its directory to its exit code, and the words around it."""

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from everstep.checkpoint.errors import EverstepError
from everstep.cluster import exit_codes
from everstep.cluster.closing import Outcome, closing_lines
from everstep.cluster.controller import Controller
from everstep.cluster.driver import ClusterDriver, Placement
from everstep.cluster.keepers import base_job, keeper_names, keeper_options
from everstep.cluster.lifecycle import Job
from everstep.cluster.local_driver import DEFAULT_PRELOAD, DEFAULT_TARGET, LocalDriver
from everstep.cluster.log_tail import BEFORE_RANKS, LogTail
from everstep.cluster.run_dir import RunDir, prepare_run_dir
from everstep.cluster.stop_signals import StopSignals
from everstep.trainer.commands import RESUBMIT_VARIABLE, resume_command
from everstep.trainer.config import RunConfig
from everstep.trainer.config_load import dump_config
from everstep.trainer.events import EventLog
from everstep.trainer.mesh_shape import resolve_mesh
from everstep.trainer.progress import ProgressView
from everstep.trainer.rank_spec import RankSpec


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
