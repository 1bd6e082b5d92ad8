"""Ways out of a checkpoint, and in: the formats of ``checkpoint.convert``, DCP, and references."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everstep.checkpoint.convert import formats
from everstep.checkpoint.convert.atomic import DEFAULT_BUDGET_BYTES, OnBytes, new_target
from everstep.checkpoint.convert.formats import Format
from everstep.checkpoint.open_place import Place
from everstep.checkpoint.step_reader import StepReader
from everstep.trainer.errors import ConfigError

REFERENCES = "zarr-references"
_HERE = "everstep.ckpt_convert"
EXPORTS: Mapping[str, Format] = {
    **formats.EXPORTS,
    "dcp": Format(
        name="dcp",
        help="a folder that torch.distributed.checkpoint loads, without everstep",
        function_name=f"{_HERE}:to_dcp",
        options=(),
        packages={},
    ),
    REFERENCES: Format(
        name=REFERENCES,
        help="a JSON file of references into the packs, for zarr-python; copies nothing",
        function_name=f"{_HERE}:to_references",
        options=("packs",),
        packages={},
    ),
}
IMPORTS: Mapping[str, Format] = {
    **formats.IMPORTS,
    "dcp": Format(
        name="dcp",
        help="a folder that torch.distributed.checkpoint has saved",
        function_name=f"{_HERE}:from_dcp",
        options=(),
        packages={},
    ),
    "safetensors": Format(
        name="safetensors",
        help="a safetensors file or a folder of them, by a conversion spec",
        function_name=f"{_HERE}:from_spec",
        options=("spec",),
        packages={},
    ),
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was made."""

    path: str
    size_bytes: int


def export(
    place: Place,
    to: str,
    target: Path,
    options: Mapping[str, Any],
    *,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    threads: int = 1,
    on_bytes: OnBytes | None = None,
) -> Result:
    """Write a checkpoint in another format.

    Args:
        place: which one.
        to: a key of ``EXPORTS``.
        target: the new file or folder.
        options: of the format.
        budget_bytes: memory to use.
        threads: that read.
        on_bytes: called with the bytes written so far.

    Raises:
        ConfigError: there is no such format, or it does not take an option.
        CheckpointError: the checkpoint, or the target, is not what the format needs.
    """
    step_id = place.chosen()
    if to == REFERENCES:
        options = {**options, "packs": _absolute(place.path(step_id))}
    write = _function(EXPORTS, "--to", to, options)
    with place.open(step_id, threads=threads) as reader:
        size_bytes = write(reader, target, budget_bytes=budget_bytes, on_bytes=on_bytes, **options)
    return Result(path=str(target), size_bytes=size_bytes)


def import_(
    source: Path,
    came_from: str,
    target: Path,
    options: Mapping[str, Any],
    *,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    on_bytes: OnBytes | None = None,
) -> Result:
    """Make a directory of checkpoints of what others wrote; its step 0 has it.

    Args:
        source: a file or folder.
        came_from: a key of ``IMPORTS``.
        target: the new directory.
        options: of the format.
        budget_bytes: memory to use.
        on_bytes: called with the bytes written so far.

    Raises:
        ConfigError: there is no such format, or it does not take an option, or needs one.
        CheckpointError: the source, or the target, is not what it should be.
    """
    read = _function(IMPORTS, "--from", came_from, options)
    done_bytes = 0

    def count(so_far: int) -> None:
        nonlocal done_bytes
        done_bytes = so_far
        if on_bytes is not None:
            on_bytes(so_far)

    made = read(source, target, budget_bytes=budget_bytes, on_bytes=count, **options)
    return Result(path=str(made), size_bytes=done_bytes)


def to_dcp(reader: StepReader, target: Path, *, budget_bytes: int, on_bytes: OnBytes | None) -> int:
    """See ``convert.dcp.export_dcp``; returns the bytes of the tensors."""
    from everstep.checkpoint.convert.dcp import PIECE_BYTES, export_dcp

    piece_bytes = min(PIECE_BYTES, budget_bytes // 4)
    with new_target(target) as folder:
        export_dcp(reader, folder, piece_bytes=piece_bytes, on_bytes=on_bytes)
    return sum(stored.spec.size_bytes for stored in reader.manifest.tensors.values())


def to_references(
    reader: StepReader, target: Path, *, packs: str, budget_bytes: int, on_bytes: OnBytes | None
) -> int:
    """See ``views.zarr_references``; returns the size of the file."""
    from everstep.checkpoint.views.zarr_references import write_references

    with new_target(target) as path:
        write_references(reader.manifest, packs, path)
    return target.stat().st_size


def from_dcp(source: Path, target: Path, *, budget_bytes: int, on_bytes: OnBytes | None) -> str:
    """See ``convert.dcp.import_dcp``; returns the path of the step."""
    from everstep.checkpoint.commit import CheckpointDirectory
    from everstep.checkpoint.convert.dcp import import_dcp

    with new_target(target) as folder:
        step_id = import_dcp(source, folder, on_bytes=on_bytes)
    return str(CheckpointDirectory(target).step_path(step_id))


def from_spec(
    source: Path,
    target: Path,
    *,
    spec: str | None = None,
    budget_bytes: int,
    on_bytes: OnBytes | None,
) -> Path:
    """See ``convert.plain.convert``; returns the path of the step."""
    from everstep.checkpoint.commit import CheckpointDirectory
    from everstep.checkpoint.convert.plain import convert

    if spec is None:
        raise ConfigError("--from safetensors needs --spec FILE: how its tensors make ours")
    convert(spec, source, target, form="checkpoint", budget_bytes=budget_bytes, on_bytes=on_bytes)
    directory = CheckpointDirectory(target)
    (step_id,) = directory.committed()
    return directory.step_path(step_id)


def _function(
    known: Mapping[str, Format], flag: str, name: str, options: Mapping[str, Any]
) -> Callable[..., Any]:
    found = known.get(name)
    if found is None:
        raise ConfigError(f"{flag}: got {name!r}, expected one of {', '.join(known)}")
    for option in options:
        if option not in found.options:
            takers = [f.name for f in known.values() if option in f.options]
            raise ConfigError(
                f"--{option.replace('_', '-')}: {flag} {name} does not take it, only "
                f"{', '.join(takers)}"
            )
    return found.load()


def _absolute(where: str) -> str:
    return where if "://" in where else str(Path(where).resolve())
