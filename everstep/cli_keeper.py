"""``everstep keeper``: the process that keeps snapshots in memory when trainers die."""

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from everstep.words import plural, size_words

keeper_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Keep snapshots in memory that outlives the trainers: start, stop, and look at keepers.",
)

JobOption = Annotated[
    str, typer.Option("--job", metavar="ID", help="Name of the job: the same for its trainers.")
]
PlaceOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Directory of the keepers' sockets, on this host; default: "
        "$XDG_RUNTIME_DIR/everstep, or /tmp/everstep-UID.",
    ),
]


@keeper_app.command(
    "start",
    short_help="Start the keeper of a job on this host, before its trainers.",
    epilog="""\b
Examples:
  everstep keeper start --job run7                  beside torchrun: before it, on each node
  srun --overlap --ntasks-per-node 1 everstep keeper start --job run7 --foreground &
  everstep keeper start --job run7 --foreground     in a container: a sidecar with the same --place
  everstep keeper start --job run7 --memory-budget 64GiB --linger-s 120

\b
The keeper owns the memory that snapshots are captured into. Trainers that are killed find them
there when they are started again; a keeper that is killed is started again at once, and loses
nothing. When all trainers of a node are gone, it makes the newest whole snapshot durable, waits
for --linger-s, and ends; nothing is left in memory then. SIGTERM: it does so at once.
""",
)
def start(
    job: JobOption,
    place: PlaceOption = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help="Most memory for snapshots, such as 64GiB; default: 80 % of what this host, or "
            "the control group, has left now.",
        ),
    ] = None,
    linger_s: Annotated[
        float, typer.Option(min=0, metavar="S", help="How long to stay without trainers.")
    ] = 900.0,
    interface: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Network interface, such as eth0, on which keepers of the job's other nodes and "
            "their trainers may read snapshots (those that know the job's token); default: none.",
        ),
    ] = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Do not detach; log to stderr.")
    ] = False,
) -> None:
    """Start the keeper of a job on this host; returns when it answers."""
    from everstep.checkpoint.errors import KeeperError
    from everstep.checkpoint.keeper import control
    from everstep.checkpoint.keeper.place import KeeperPlace

    budget_bytes = None if memory_budget is None else parse_size(memory_budget)
    where = KeeperPlace.of(job, place)
    if foreground:
        where.make()
        if where.is_held():
            raise KeeperError(f"the keeper of job {job} is running already, in {where.path}")
        command = control.command_line(
            where, budget_bytes=budget_bytes, linger_s=linger_s, interface=interface
        )
        os.execve(command[0], command, control.environment())
    started = control.start(
        job, place=place, budget_bytes=budget_bytes, linger_s=linger_s, interface=interface
    )
    found = control.status(job, place=place)
    how = "has started" if started else "is running already"
    budget = f", budget {size_words(found['budget_bytes'])}" if found else ""
    print(f"the keeper of job {job} {how}, in {where.path}{budget}")


@keeper_app.command(
    "stop",
    short_help="Make the newest snapshot durable, and end the keeper of a job.",
    epilog="""\b
Examples:
  everstep keeper stop --job run7
  everstep keeper stop --job run7 --now     what is not durable yet is lost
""",
)
def stop(
    job: JobOption,
    place: PlaceOption = None,
    now: Annotated[bool, typer.Option("--now", help="At once, without saving.")] = False,
) -> None:
    """End the keeper of a job; returns when nothing of it is left."""
    from everstep.checkpoint.keeper import control

    stopped = control.stop(job, place=place, now=now)
    print(f"the keeper of job {job} has ended" if stopped else f"there is no keeper of job {job}")


@keeper_app.command(
    "status",
    short_help="Show what the keepers of this host hold.",
    epilog="""\b
Examples:
  everstep keeper status
  everstep keeper status --job run7
  everstep keeper status --json | jq '.[].flushes.last'

\b
Exit code: 1 where --job names a job without a keeper.
""",
)
def status(
    job: Annotated[
        str | None, typer.Option("--job", metavar="ID", help="This job only; default: all.")
    ] = None,
    place: PlaceOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Show what the keepers of this host hold, and what they are doing."""
    from everstep.checkpoint.keeper import control

    if job is None:
        found = control.all_status(place)
    else:
        one = control.status(job, place=place)
        found = [] if one is None else [one]
    if as_json:
        print(json.dumps(found))
    else:
        print("\n".join(map(describe_keeper, found)) or "no keeper is running here")
    if job is not None and not found:
        raise typer.Exit(1)


def describe_keeper(found: dict[str, Any]) -> str:
    """A keeper's status for people, in a few lines."""
    flushes = found["flushes"]
    lines = [
        f"{found['job']}: process {found['pid']}, {plural(len(found['trainers']), 'trainer')}, "
        f"{size_words(found['memory_bytes'])} of {size_words(found['budget_bytes'])} in use"
    ]
    for slot in found["slots"]:
        holds = f"step {slot['step']}" if slot["sealed"] else "nothing sealed"
        since = "" if slot["age_s"] is None else f", for {slot['age_s']:.0f} s"
        pinned = ", being read" if slot["pinned"] else ""
        name = f"rank {slot['rank']} slot {slot['index']}"
        lines.append(f"  {name}: {holds}{since}{pinned} ({size_words(slot['bytes'])})")
    under_way = ", ".join(f"step {r['step']} of rank {r['rank']}" for r in flushes["running"])
    lines.append(
        f"  flushes: {flushes['done']} done, {flushes['failed']} failed"
        + (f"; under way: {under_way}" if under_way else "")
    )
    if flushes["last"] is not None and flushes["last"]["error"] is not None:
        lines.append(f"  last flush failed: {flushes['last']['error']}")
    return "\n".join(lines)


def parse_size(text: str) -> int:
    """'64GiB' -> 68719476736; KiB, MiB, GiB, TiB, or bytes. Raises typer.BadParameter."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(|[KMGT]iB)", text.strip())
    if match is None:
        raise typer.BadParameter(f"--memory-budget: got {text!r}, expected such as 64GiB or 500MiB")
    factor = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[match[2]]
    return int(float(match[1]) * factor)
