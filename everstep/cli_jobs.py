"""Commands about jobs on a Ray cluster: submit, status, logs, stop."""

import os
from pathlib import Path
from typing import Annotated

import typer

from everstep.cli_options import ConfigArgument, Nproc, Overrides, Resume

Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="The cluster's dashboard, http://HEAD:8265; default: RAY_API_SERVER_ADDRESS, "
        "RAY_ADDRESS.",
    ),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="What `everstep submit` printed.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(epilog=_SUBMIT_EPILOG)(submit)
    app.command(epilog=_STATUS_EPILOG)(status)
    app.command(epilog=_LOGS_EPILOG)(logs)
    app.command(epilog=_STOP_EPILOG)(stop)


_SUBMIT_EPILOG = """\b
Examples:
  everstep submit demo --address http://head:8265 --run-dir /shared/runs/demo
  everstep submit my.yaml optim.lr=3e-4 --run-dir /shared/runs/a --nproc 16 --detach
  everstep submit my.yaml --run-dir /shared/runs/a --env WANDB_API_KEY --pip wandb

\b
The same command goes on with the run where it was stopped. Ctrl-C only ends the following: the job
goes on. The folder where you are goes along, so that your own modules can be imported on all nodes;
hidden entries, byte code, virtual environments, runs/ and what .everstepignore names stay behind.
Exit code: that of the run (0 done, 1 failed, 2 wrong config, 75 stopped), 130 after Ctrl-C.
"""


def submit(
    config: ConfigArgument,
    overrides: Overrides = None,
    address: Address = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where everything of this run is written: an absolute path on storage that all "
            "nodes see. Needed.",
        ),
    ] = None,
    nproc: Nproc = None,
    resume: Resume = "auto",
    working_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The folder with your code; default: where you are."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Leave this name, or path with a slash, out; may be repeated."
        ),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=VALUE]",
            help="Set a variable for the run (NAME alone: as it is here); whoever sees the "
            "cluster's dashboard can read it.",
        ),
    ] = None,
    pip: Annotated[
        list[str] | None,
        typer.Option(metavar="PACKAGE", help="Have the cluster install this for the job."),
    ] = None,
    python: Annotated[
        str, typer.Option(metavar="PATH", help="The Python to run with on the head node.")
    ] = "python",
    job_id: Annotated[
        str | None,
        typer.Option("--id", metavar="ID", help="Id of the job; default: one is made up."),
    ] = None,
    follow: Annotated[
        bool,
        typer.Option("--follow/--detach", help="Show the output until the end, or return at once."),
    ] = True,
) -> None:
    """Train the model that CONFIG describes on a Ray cluster."""
    from everstep.cluster.submission import Request, check_run_dir, parse_env
    from everstep.jobs import submit as run

    request = Request(
        ref=config,
        overrides=tuple(overrides or ()),
        run_dir=check_run_dir(run_dir, Path(config).stem),
        nproc=nproc,
        resume=resume,
        python=python,
        env=parse_env(env or (), os.environ),
        pip=tuple(pip or ()),
        working_dir=None if working_dir is None else str(working_dir),
        exclude=tuple(exclude or ()),
        address=address,
    )
    raise typer.Exit(run(request, job_id=job_id, follow=follow, environment=os.environ))


_STATUS_EPILOG = """\b
Examples:
  everstep status runs/demo                     a run on this host, and what its keepers hold
  everstep status --address http://head:8265
  everstep status everstep-demo-20261122-0130-ab12
  everstep status --json | jq '.[] | select(.state == "running") | .id'
"""


def status(
    job_id: Annotated[
        str | None,
        typer.Argument(
            metavar="[ID|RUN_DIR]",
            help="One job in detail, or a run directory on this host; default: all jobs.",
        ),
    ] = None,
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """List the runs that were submitted to a cluster, or show one; or a run on this host."""
    if job_id is not None and (os.sep in job_id or Path(job_id).is_dir()):
        from everstep.run_status import show_run

        show_run(Path(job_id), as_json=as_json)
        return
    from everstep.jobs import status as show

    show(job_id, address=address, as_json=as_json, environment=os.environ)


_LOGS_EPILOG = """\b
Examples:
  everstep logs everstep-demo-20261122-0130-ab12 | tail
  everstep logs everstep-demo-20261122-0130-ab12 --follow
"""


def logs(
    job_id: JobId,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Until the end; exit code: that of the run.")
    ] = False,
) -> None:
    """Print the output of a submitted run."""
    from everstep.jobs import logs as show

    raise typer.Exit(show(job_id, address=address, follow=follow, environment=os.environ))


_STOP_EPILOG = """\b
Examples:
  everstep stop everstep-demo-20261122-0130-ab12        finish the step, save, end
  everstep stop everstep-demo-20261122-0130-ab12 --now  end at once, without saving

\b
Exit code: 0 when the run has stopped (or had ended already), 1 when it had to be killed.
"""


def stop(
    job_id: JobId,
    address: Address = None,
    now: Annotated[bool, typer.Option("--now", help="At once, without saving.")] = False,
) -> None:
    """Have a submitted run finish its step, save and end."""
    from everstep.jobs import stop as ask

    raise typer.Exit(ask(job_id, address=address, now=now, environment=os.environ))
