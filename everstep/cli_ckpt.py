"""``everstep ckpt``: look at checkpoints, verify, compare and clear them away.

Export and import are in ``cli_ckpt_convert.py``.
"""

import functools
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer

from everstep.cli_options import StorageOption, parse_storage_options

if TYPE_CHECKING:
    from everstep.checkpoint.step_reader import StepReader

ckpt_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Look at checkpoints, verify, compare, convert and clear them away.",
)

PlaceArgument = Annotated[
    str,
    typer.Argument(
        metavar="PLACE",
        help="Path or URL of a run directory, of its checkpoints directory, or of the directory of "
        "one step; PLACE@N is step N of it.",
    ),
]
StepOption = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="Which step; default: the newest.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Only tensors of such names; may be repeated."),
]
Threads = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Copy threads; default: one per core.")
]
_P = ParamSpec("_P")
_R = TypeVar("_R")
_NOT_THE_SAME = 1
_TROUBLE = 2


def in_one_sentence(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """A function that tells what a file system refuses as it tells its own errors."""

    @functools.wraps(command)
    def run(*args: _P.args, **options: _P.kwargs) -> _R:
        try:
            return command(*args, **options)
        except BrokenPipeError:
            raise
        except OSError as error:
            from everstep.checkpoint.errors import CheckpointError

            where = f"{error.filename}: " if error.filename else ""
            raise CheckpointError(f"{where}{error.strerror or error}") from error

    return run


@ckpt_app.command(
    "ls",
    short_help="List the checkpoints of a run.",
    epilog="""\b
Examples:
  everstep ckpt ls runs/demo
  everstep ckpt ls runs/demo --all         also half-written ones, and those of abandoned attempts
  everstep ckpt ls s3://bucket/demo --storage-option endpoint_url=https://minio:9000
  everstep ckpt ls runs/demo --json | jq '.steps[-1].path'

\b
'whole' means that the manifest is undamaged and that no pack is missing or cut short; what is in
the packs is read by `everstep ckpt verify`. Exit code: 1 when something listed is damaged.
""",
)
@in_one_sentence
def ls(
    place: PlaceArgument,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Also steps outside the lineage of the newest attempt."),
    ] = False,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the steps that a run can go on from."""
    import time

    from everstep import ckpt_view
    from everstep.checkpoint.open_place import open_place
    from everstep.ckpt_survey import survey
    from everstep.ckpt_text import stdout_console

    opened = open_place(place, storage_options=parse_storage_options(storage_option))
    found = survey(opened.directory)
    if as_json:
        _print_json(ckpt_view.steps_json(opened, found, everything=everything))
    else:
        ckpt_view.print_steps(
            stdout_console(), opened, found, everything=everything, now_s=time.time()
        )
    if found.problem:
        _complain(found.problem)
    if found.problem or any(facts.problem for facts in found.steps):
        raise typer.Exit(_NOT_THE_SAME)


@ckpt_app.command(
    "inspect",
    short_help="Show what a checkpoint consists of.",
    epilog="""\b
Examples:
  everstep ckpt inspect runs/demo
  everstep ckpt inspect runs/demo@200 --only 'model.layers.0.*'
  everstep ckpt inspect runs/demo --tensor model.head.weight    where its boxes are
""",
)
@in_one_sentence
def inspect(
    place: PlaceArgument,
    step: StepOption = None,
    only: OnlyOption = None,
    tensor: Annotated[
        str | None, typer.Option(metavar="NAME", help="Show all boxes of this tensor.")
    ] = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show mesh, versions, objects, packs and tensors of a checkpoint, from its manifest alone."""
    from everstep import ckpt_view
    from everstep.checkpoint.errors import CheckpointError
    from everstep.checkpoint.open_place import open_place
    from everstep.ckpt_text import stdout_console

    opened = open_place(place, step, storage_options=parse_storage_options(storage_option))
    step_id = opened.chosen()
    manifest = opened.directory.manifest(step_id)
    if tensor is not None:
        if tensor not in manifest.tensors:
            raise CheckpointError(
                f"{opened.path(step_id)} has no tensor {tensor!r}: `everstep ckpt inspect` lists "
                "them"
            )
        found = ckpt_view.tensor_json(manifest, tensor)
    else:
        found = ckpt_view.manifest_json(opened.path(step_id), manifest, only or ())
    if as_json:
        _print_json(found)
    elif tensor is not None:
        ckpt_view.print_tensor(stdout_console(), found)
    else:
        ckpt_view.print_manifest(stdout_console(), found)


@ckpt_app.command(
    "verify",
    short_help="Read everything, and report all damage.",
    epilog="""\b
Examples:
  everstep ckpt verify runs/demo
  everstep ckpt verify runs/demo@200 --digest    equal digests: equal states, in any layout

\b
Exit code: 0 whole, 1 damaged.
""",
)
@in_one_sentence
def verify(
    place: PlaceArgument,
    step: StepOption = None,
    digest: Annotated[
        bool, typer.Option("--digest", help="Also compute the digest of the state.")
    ] = False,
    threads: Threads = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read every byte of a checkpoint and compare it with its checksum."""
    from everstep import ckpt_report
    from everstep.checkpoint.digest import digest_step
    from everstep.checkpoint.open_place import open_place
    from everstep.checkpoint.verify import verify_index, verify_packs
    from everstep.ckpt_text import byte_progress, stdout_console

    opened = open_place(place, step, storage_options=parse_storage_options(storage_option))
    step_id = opened.chosen()
    workers = _threads(threads)
    with opened.open(step_id, threads=workers) as reader:
        manifest, state = reader.manifest, None
        with byte_progress("verifying", manifest.size_bytes) as on_bytes:
            damages = verify_packs(
                opened.files(step_id), manifest, threads=workers, on_bytes=on_bytes
            )
        damages += verify_index(opened.files(step_id), manifest)
        if digest and not damages:
            with byte_progress("digesting", _size_bytes(reader, manifest.tensors)) as on_bytes:
                state = digest_step(reader, on_bytes=on_bytes)
    found = ckpt_report.verification_json(opened.path(step_id), manifest, damages, state)
    if as_json:
        _print_json(found)
    else:
        ckpt_report.print_verification(stdout_console(), found)
    raise typer.Exit(0 if found["whole"] else _NOT_THE_SAME)


@ckpt_app.command(
    "diff",
    short_help="Compare two checkpoints, whatever their layouts are.",
    epilog="""\b
Examples:
  everstep ckpt diff runs/a runs/b
  everstep ckpt diff runs/a@100 runs/a@200 --only 'model.*'
  everstep ckpt diff runs/a runs/b --atol 1e-6 --json

\b
Exit code: 0 equal, 1 different, 2 they cannot be compared.
""",
)
def diff(
    first: PlaceArgument,
    second: PlaceArgument,
    only: OnlyOption = None,
    atol: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="X",
            help="Numbers that differ by at most this much are equal; default: bits are compared.",
        ),
    ] = None,
    threads: Threads = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare names, shapes, dtypes, values and objects of two checkpoints.

    States of random generators belong to a mesh; on different meshes they are left out. With
    --only, objects are left out, too.
    """
    from everstep.checkpoint.errors import EverstepError

    compare = in_one_sentence(_diff)
    try:
        options = parse_storage_options(storage_option)
        code = compare(
            (first, second), only or [], atol, _threads(threads), options, as_json=as_json
        )
    except EverstepError as error:
        _complain(str(error))
        code = _TROUBLE
    raise typer.Exit(code)


def _diff(
    texts: tuple[str, str],
    only: list[str],
    atol: float | None,
    threads: int,
    options: dict[str, object],
    *,
    as_json: bool,
) -> int:
    from everstep import ckpt_report
    from everstep.checkpoint.compare import compare_steps
    from everstep.checkpoint.errors import CheckpointError
    from everstep.checkpoint.layout import RNG_PREFIX
    from everstep.checkpoint.open_place import open_place
    from everstep.ckpt_text import byte_progress, matching, stdout_console

    places = [open_place(text, storage_options=options) for text in texts]
    chosen = [place.chosen() for place in places]
    with (
        places[0].open(chosen[0], threads=threads) as one,
        places[1].open(chosen[1], threads=threads) as two,
    ):
        union = dict.fromkeys([*one.manifest.tensors, *two.manifest.tensors])
        asked = matching(union, only)
        rng = dict(one.manifest.mesh) == dict(two.manifest.mesh)
        names = [n for n in asked if rng or not n.startswith(RNG_PREFIX)]
        if only and not names:
            raise CheckpointError(
                f"--only {' '.join(only)}: states of random generators belong to a mesh, and are "
                "not compared where the meshes differ"
            )
        total_bytes = _size_bytes(one, names)
        with byte_progress("comparing", total_bytes) as on_bytes:
            result = compare_steps(
                one, two, names=names, atol=atol, objects=not only, on_bytes=on_bytes
            )
    paths = [place.path(step_id) for place, step_id in zip(places, chosen, strict=True)]
    found = ckpt_report.comparison_json(paths[0], paths[1], result)
    if as_json:
        _print_json({**found, "rng_compared": rng})
    else:
        ckpt_report.print_comparison(
            stdout_console(), found, left_out=len(asked) - len(names), objects=not only
        )
    return 0 if result.equal else _NOT_THE_SAME


@ckpt_app.command(
    "gc",
    short_help="Delete what no run needs any more.",
    epilog="""\b
Examples:
  everstep ckpt gc runs/demo --dry-run     show what would go
  everstep ckpt gc runs/demo               half-written steps, those of abandoned attempts
  everstep ckpt gc runs/demo --keep 2      also all but the newest two steps

\b
The newest checkpoint is never deleted. A directory that a job writes to is refused.
""",
)
@in_one_sentence
def gc(
    place: PlaceArgument,
    keep: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Keep the newest N steps; default: all of the run."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show it, delete nothing.")] = False,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete half-written steps, steps outside the lineage, and all but the newest N."""
    from everstep import ckpt_gc
    from everstep.checkpoint.open_place import open_place
    from everstep.ckpt_text import stdout_console

    opened = open_place(place, storage_options=parse_storage_options(storage_option))
    opened.check_whole()
    plan = ckpt_gc.collect(opened, keep, dry_run=dry_run)
    found = ckpt_gc.gc_json(opened, plan, dry_run=dry_run)
    if as_json:
        _print_json(found)
    else:
        ckpt_gc.print_gc(stdout_console(), found)


def _size_bytes(reader: "StepReader", names: Iterable[str]) -> int:
    tensors = reader.manifest.tensors
    return sum(tensors[name].spec.size_bytes for name in names if name in tensors)


def _threads(asked: int | None) -> int:
    import os

    return asked or len(os.sched_getaffinity(0))


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value))


def _complain(problem: str) -> None:
    sentence = problem.replace("\n", " ")
    print(f"error: {sentence}", file=sys.stderr)
