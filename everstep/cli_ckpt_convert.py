"""``everstep ckpt export`` and ``import``: checkpoints for others, and those of others."""

from pathlib import Path
from typing import Annotated

import typer

from everstep.cli_ckpt import JsonOption, PlaceArgument, StepOption, ckpt_app, in_one_sentence
from everstep.cli_options import StorageOption, parse_storage_options

__all__ = ["ckpt_app"]

BudgetOption = Annotated[
    int, typer.Option(min=1, metavar="MIB", help="Memory to use for data, in MiB.")
]
DtypeOption = Annotated[
    str | None,
    typer.Option(metavar="TYPE", help="Of floating-point tensors: F32, BF16, …; default: as is."),
]


@ckpt_app.command(
    "export",
    short_help="Write a checkpoint in another format.",
    epilog="""\b
Formats:
  hf               a folder that transformers' LlamaForCausalLM.from_pretrained loads
  safetensors      one safetensors file
  torch            a state dict for torch.load(..., weights_only=True)
  dcp              a folder that torch.distributed.checkpoint loads, without everstep
  zarr             a Zarr v3 archive: sharded, compressed, with checksums
  zarr-references  a JSON file of references into the packs, for zarr-python; copies nothing

\b
Examples:
  everstep ckpt export runs/demo demo-hf --to hf --dtype BF16 --tokenizer tokenizer.json
  everstep ckpt export runs/demo@200 weights.safetensors --to safetensors
  everstep ckpt export runs/demo demo.zarr --to zarr --what everything
  everstep ckpt export s3://bucket/demo demo.pt --to torch

\b
The target is a new file or folder: it appears whole, or not at all.
""",
)
@in_one_sentence
def export(
    place: PlaceArgument,
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The new file or folder.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="Which; see below.")],
    step: StepOption = None,
    dtype: DtypeOption = None,
    what: Annotated[
        str | None,
        typer.Option(metavar="model|everything", help="Which tensors; default: by format."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A tokenizer.json to copy along.")
    ] = None,
    max_shard_bytes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Size of a file; default: 5e9.")
    ] = None,
    level: Annotated[
        int | None, typer.Option(min=1, max=22, metavar="N", help="Of compression; default: 3.")
    ] = None,
    budget_mib: BudgetOption = 256,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint in another format."""
    from everstep.checkpoint.open_place import open_place
    from everstep.ckpt_convert import export as run
    from everstep.ckpt_text import byte_progress
    from everstep.trainer.errors import ConfigError

    if what not in (None, "model", "everything"):
        raise ConfigError(f"--what: got {what!r}, expected model or everything")
    _check_local("TARGET", target)
    given = {
        "dtype": _float_type(dtype),
        "what": what,
        "tokenizer": tokenizer,
        "max_shard_bytes": max_shard_bytes,
        "level": level,
    }
    options = {name: value for name, value in given.items() if value is not None}
    opened = open_place(place, step, storage_options=parse_storage_options(storage_option))
    with byte_progress("exporting", None) as on_bytes:
        made = run(opened, to, target, options, budget_bytes=budget_mib * 2**20, on_bytes=on_bytes)
    _tell(made.path, made.size_bytes, as_json)


@ckpt_app.command(
    "import",
    short_help="Make a checkpoint of what others wrote.",
    epilog="""\b
Formats:
  hf           a folder with config.json and safetensors of a Llama
  dcp          a folder that torch.distributed.checkpoint has saved
  safetensors  a safetensors file or a folder of them, by a conversion spec

\b
Examples:
  everstep ckpt import llama-hf checkpoints/llama --from hf
  everstep train my.yaml model.init_from=checkpoints/llama
  everstep ckpt import old-run/dcp checkpoints/old --from dcp
  everstep ckpt import shards checkpoints/mine --from safetensors --spec mine.yaml

\b
The target is a new directory, whose step 0 has what was imported.
""",
)
@in_one_sentence
def import_(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A file or folder.")],
    target: Annotated[Path, typer.Argument(metavar="PLACE", help="The new directory.")],
    came_from: Annotated[str, typer.Option("--from", metavar="FORMAT", help="Which; see below.")],
    dtype: DtypeOption = None,
    spec: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A conversion spec (docs/converting.md), or a packaged one: everything, llama, "
            "model, weights.",
        ),
    ] = None,
    budget_mib: BudgetOption = 256,
    as_json: JsonOption = False,
) -> None:
    """Make a directory of checkpoints of what others wrote."""
    from everstep.ckpt_convert import import_ as run
    from everstep.ckpt_text import byte_progress

    _check_local("SOURCE", source)
    _check_local("PLACE", target)
    given = {"dtype": _float_type(dtype), "spec": spec}
    options = {name: value for name, value in given.items() if value is not None}
    with byte_progress("importing", None) as on_bytes:
        made = run(
            source, came_from, target, options, budget_bytes=budget_mib * 2**20, on_bytes=on_bytes
        )
    _tell(made.path, made.size_bytes, as_json)


def _check_local(what: str, path: Path) -> None:
    """Raises ConfigError for a URL, which would become a folder named ``s3:``."""
    from everstep.trainer.errors import ConfigError

    scheme, colon, rest = str(path).partition(":/")  # of a Path: two slashes are one
    if colon and scheme.replace("+", "").isalnum():
        raise ConfigError(
            f"{what}: got {scheme}://{rest}, expected a path on this machine: what is in an object "
            "store is copied there and back with its own tools"
        )


def _float_type(given: str | None) -> str | None:
    """The name of a type as we write it; raises ConfigError."""
    from everstep.checkpoint.convert.cast import FLOATS
    from everstep.trainer.errors import ConfigError

    if given is not None and given.upper() not in FLOATS:
        raise ConfigError(f"--dtype: got {given!r}, expected one of {', '.join(FLOATS)}")
    return given and given.upper()


def _tell(path: str, size_bytes: int, as_json: bool) -> None:
    import json

    from everstep.words import size_words

    if as_json:
        print(json.dumps({"path": path, "size_bytes": size_bytes}))
    else:
        print(f"{path}: {size_words(size_bytes)}")
