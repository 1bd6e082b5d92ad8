"""The ``everstep`` command; what a command needs is imported when it runs, so help is instant."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from everstep.checkpoint.errors import EverstepError
from everstep.cli_ckpt_convert import ckpt_app
from everstep.cli_data import data_app
from everstep.cli_jobs import register as register_job_commands
from everstep.cli_keeper import keeper_app
from everstep.cli_options import ConfigArgument, Nproc, Overrides, Resume
from everstep.launch import Launcher
from everstep.trainer.errors import ConfigError

app = typer.Typer(
    name="everstep",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: rich alone would double the time until it is shown
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
    epilog="""\b
Start here:
  everstep doctor                        is this machine fit for training?
  everstep train demo                    train a small model on this machine, in minutes
  everstep config list                   the configs that come with everstep
  everstep config show demo > my.yaml    a config of your own, with every setting in it
  everstep train my.yaml optim.lr=3e-4   train it, with one setting changed
  everstep submit my.yaml --address http://HEAD:8265 --run-dir /shared/run    on a Ray cluster
""",
)
config_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at configs.")
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
app.add_typer(ckpt_app, name="ckpt")
app.add_typer(keeper_app, name="keeper")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 bad usage or config, others as the command says."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="everstep")
    except EverstepError as error:
        sentence = str(error).replace("\n", " ")
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


def _print_version(wanted: bool) -> None:
    if wanted:
        from everstep import __version__

        print(f"everstep {__version__}")
        raise typer.Exit


@app.callback()
def everstep(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Train language models, sharded over GPUs or CPU cores, and never lose a step."""


@app.command(
    epilog="""\b
Examples:
  everstep train demo                              start, or go on where it was stopped
  everstep train demo train.steps=500 name=longer  change settings
  everstep train my.yaml --resume never            start from the beginning
  torchrun --nproc-per-node 8 -m everstep train my.yaml
  srun --ntasks-per-node 8 everstep train my.yaml

\b
Ctrl-C finishes the step, saves and exits with code 75; the same command goes on from there.
A second Ctrl-C stops at once.
""",
)
def train(
    config: ConfigArgument,
    overrides: Overrides = None,
    launcher: Annotated[
        Launcher,
        typer.Option(
            help="Who starts the ranks: 'local' this command, 'ray' a Ray cluster (or Ray on this "
            "host), 'external' torchrun or srun, whose environment it reads; 'auto' sees which."
        ),
    ] = Launcher.AUTO,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT|auto",
            help="The Ray cluster to train in; default: launch.address, RAY_ADDRESS, or else Ray "
            "is started on this host for the run.",
        ),
    ] = None,
    nproc: Nproc = None,
    resume: Resume = "auto",
    run_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where everything of this run is written; default: runs/NAME."
        ),
    ] = None,
) -> None:
    """Train the model that CONFIG describes."""
    import os

    from rich.console import Console

    from everstep.launch import train as run

    code = run(
        config,
        overrides or [],
        launcher=launcher,
        nproc=nproc,
        resume=resume,
        run_dir=run_dir,
        environment=os.environ,
        console=Console(),
        address=address,
    )
    raise typer.Exit(code)


register_job_commands(app)


@config_app.command("show")
def config_show(config: ConfigArgument, overrides: Overrides = None, nproc: Nproc = None) -> None:
    """Print the resolved run as YAML, with what follows from it on N ranks as comments."""
    from everstep.config_view import show_config

    print(show_config(config, overrides or [], nproc), end="")


@config_app.command("list")
def config_list() -> None:
    """List the packaged configs."""
    from everstep.config_view import list_configs

    print(list_configs(), end="")


@app.command(
    short_help="Report what this machine offers, and what to do about it.",
    epilog="""\b
Examples:
  everstep doctor
  everstep doctor my.yaml mesh.tp=2
""",
)
def doctor(
    config: Annotated[
        str | None,
        typer.Argument(metavar="[CONFIG]", help="Also check that this config can run here."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Report what this machine offers and what to do about it; exit code 1 if something fails."""
    if config is None:
        from everstep.doctor import examine

        raise typer.Exit(examine())
    # Apart, because a doctor has to work where packages that configs need are missing.
    from everstep.doctor_run import examine_run

    raise typer.Exit(examine_run(config, overrides or []))
