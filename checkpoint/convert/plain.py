"""Whole checkpoints, or models of any kind, as one file or folder that other libraries open."""

from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from everstep.checkpoint.convert.atomic import (
    DEFAULT_BUDGET_BYTES,
    ByteCount,
    OnBytes,
    new_target,
)
from everstep.checkpoint.convert.converted import Converted
from everstep.checkpoint.convert.plan import plan_extract, plan_union, with_dtype
from everstep.checkpoint.convert.safetensors_source import SafetensorsSource
from everstep.checkpoint.convert.safetensors_writer import write_file
from everstep.checkpoint.convert.source import Source
from everstep.checkpoint.convert.spec import Spec, load_spec
from everstep.checkpoint.convert.step_source import StepSource
from everstep.checkpoint.convert.step_writer import write_step
from everstep.checkpoint.open_place import find_place
from everstep.checkpoint.step_reader import StepReader

What = Literal["model", "everything"]
"""Parameters and buffers under the names that their module gives them, or every tensor."""
Direction = Literal["union", "extract"]
Form = Literal["safetensors", "checkpoint"]


def selected(reader: StepReader, what: What, dtype: str | None) -> Converted:
    """Some of a step's tensors, renamed and cast; a ``Source``. Raises ConversionError."""
    source = StepSource(reader)
    plan = plan_extract(load_spec(what), source.tensors, where=source.where)
    return Converted(with_dtype(plan, dtype), source)


def export_safetensors(
    reader: StepReader,
    target: Path,
    *,
    what: What = "model",
    dtype: str | None = None,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    on_bytes: OnBytes | None = None,
) -> int:
    """Write a step as one safetensors file; returns the bytes of its tensors.

    Args:
        reader: of the step.
        target: the file; it appears whole, or not at all.
        what: which tensors.
        dtype: of all floating-point tensors, such as 'BF16'; None: as they are stored.
        budget_bytes: memory to use.
        on_bytes: progress.

    Raises:
        TargetExistsError: the target is taken.
        DamagedError: a pack is not what the manifest says.
    """
    source, written = selected(reader, what, dtype), ByteCount(on_bytes)
    with new_target(target) as path:
        write_file(
            path, source, source.tensors.values(), budget_bytes=budget_bytes, written=written
        )
    return written.total


def convert(
    spec: Spec | str | Path,
    source: str | Path,
    target: Path,
    *,
    direction: Direction = "union",
    form: Form = "safetensors",
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    on_bytes: OnBytes | None = None,
) -> int:
    """Carry a conversion spec out on files; returns the bytes that were written.

    Args:
        spec: a spec, the file of one, or the name of a packaged one.
        source: a safetensors file, a folder of them, or a checkpoint of ours: see ``open_place``.
        target: the new file, or directory of checkpoints.
        direction: 'union' makes the spec's logical tensors from stored ones, 'extract' the inverse.
        form: what to write: one safetensors file, or a checkpoint directory whose step 0 has it.
        budget_bytes: memory to use.
        on_bytes: progress.

    Raises:
        SpecError: the spec cannot be read.
        ConversionError: the source is not what the spec expects.
        TargetExistsError: the target is taken.
        DamagedError: the source is damaged.
    """
    parsed = spec if isinstance(spec, Spec) else load_spec(spec)
    with ExitStack() as stack:
        opened: Source
        if (place := find_place(source)) is not None:
            opened = StepSource(stack.enter_context(place.open()))
            where = opened.where
        else:
            files = SafetensorsSource(Path(source), with_file=parsed.with_file)
            opened, where = stack.enter_context(files), str(source)
        return _convert(parsed, opened, where, target, direction, form, budget_bytes, on_bytes)


def _convert(
    spec: Spec,
    source: Source,
    where: str,
    target: Path,
    direction: Direction,
    form: Form,
    budget_bytes: int,
    on_bytes: OnBytes | None,
) -> int:
    make = plan_union if direction == "union" else plan_extract
    converted = Converted(make(spec, source.tensors, where=where), source)
    written = ByteCount(on_bytes)
    if form == "checkpoint":
        write_step(converted, target, objects={}, budget_bytes=budget_bytes, on_bytes=written.reach)
        return written.total
    with new_target(target) as path:
        tensors = converted.tensors.values()
        write_file(path, converted, tensors, budget_bytes=budget_bytes, written=written)
    return written.total
