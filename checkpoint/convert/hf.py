"""Hugging Face's folders: a committed step to one that transformers loads, and back."""

import json
from pathlib import Path
from typing import Any

from everstep.checkpoint.convert.architecture import (
    Architecture,
    from_hf_config,
    from_objects,
    to_hf_config,
    to_object,
)
from everstep.checkpoint.convert.atomic import (
    DEFAULT_BUDGET_BYTES,
    ByteCount,
    OnBytes,
    new_target,
)
from everstep.checkpoint.convert.cast import check_float
from everstep.checkpoint.convert.converted import Converted
from everstep.checkpoint.convert.plan import Plan, plan_extract, plan_union
from everstep.checkpoint.convert.safetensors_source import SafetensorsSource
from everstep.checkpoint.convert.safetensors_writer import plan_shards, write_shards
from everstep.checkpoint.convert.source import Source
from everstep.checkpoint.convert.spec import load_spec
from everstep.checkpoint.convert.step_source import StepSource
from everstep.checkpoint.convert.step_writer import write_step
from everstep.checkpoint.direct_io import write_durable
from everstep.checkpoint.errors import CheckpointError
from everstep.checkpoint.layout import TensorSpec
from everstep.checkpoint.step_reader import StepReader

CONFIG_NAME = "config.json"
MAX_CONFIG_BYTES = 2**24
DEFAULT_SHARD_BYTES = 5 * 10**9
_TIED_HEAD = "lm_head.weight"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def export_hf(
    reader: StepReader,
    target: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    tokenizer: Path | None = None,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    on_bytes: OnBytes | None = None,
) -> int:
    """Write a folder that ``LlamaForCausalLM.from_pretrained`` loads; returns its tensors' bytes.

    Args:
        reader: of the step.
        target: the folder; it appears whole, or not at all.
        dtype: of the tensors, such as 'BF16'; None: that of the embedding.
        max_shard_bytes: size of a file; a larger tensor has one to itself.
        tokenizer: a ``tokenizer.json`` to copy, with the files that describe it.
        budget_bytes: memory to use.
        on_bytes: progress.

    Raises:
        CheckpointError: the checkpoint does not say what model it is of, or it is not the built-in;
            or there is no such dtype to convert to.
        ConversionError: it holds other tensors than this model has.
        TargetExistsError: the target is taken.
        DamagedError: a pack is not what the manifest says.
    """
    if dtype is not None:
        check_float(dtype)
    if tokenizer is not None and not tokenizer.is_file():
        raise CheckpointError(f"there is no tokenizer file {tokenizer}: give a tokenizer.json")
    source = StepSource(reader)
    where = source.where
    architecture = from_objects(reader.manifest.objects, where)
    embedding = source.tensors.get("model.model.embed_tokens.weight")
    dtype = dtype or (embedding.dtype if embedding else "F32")
    plan = plan_extract(
        load_spec("llama"), source.tensors, architecture.hf_tensors(dtype), where=where
    )
    converted = Converted(plan, source)
    written = ByteCount(on_bytes)
    with new_target(target) as folder:
        folder.mkdir()
        shards = plan_shards(converted.tensors.values(), max_shard_bytes)
        write_shards(folder, converted, shards, budget_bytes=budget_bytes, written=written)
        config = json.dumps(to_hf_config(architecture, dtype), indent=2)
        write_durable(folder / CONFIG_NAME, f"{config}\n".encode())
        if tokenizer is not None:
            _copy_tokenizer(tokenizer, folder)
    return written.total


def import_hf(
    source: Path,
    target_directory: Path,
    *,
    dtype: str = "F32",
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    on_bytes: OnBytes | None = None,
) -> Path:
    """Make a checkpoint directory whose step 0 has the weights of a Llama in transformers' format.

    Args:
        source: a folder with ``config.json`` and safetensors.
        target_directory: the new directory; it appears whole, or not at all.
        dtype: of the tensors, F32 for training.
        budget_bytes: memory to use; no fragment is larger than a quarter of it.
        on_bytes: progress.

    Returns:
        The path of the step.

    Raises:
        CheckpointError: there is no such dtype to convert to, or nothing at ``source``.
        ArchitectureError: it is not what the built-in model can be.
        ConversionError: it holds other tensors than this model has.
        TargetExistsError: the target is taken.
        SafetensorsError: a file of it is not valid.
    """
    check_float(dtype)
    with SafetensorsSource(source) as files:
        architecture = read_architecture(source)
        plan = plan_hf_import(
            files, architecture, architecture_tensors(architecture, dtype), source
        )
        return write_step(
            Converted(plan, files),
            target_directory,
            objects={"object.architecture": to_object(architecture)},
            budget_bytes=budget_bytes,
            on_bytes=on_bytes,
        )


def plan_hf_import(
    files: Source, architecture: Architecture, wanted: dict[str, TensorSpec], where: Path
) -> Plan:
    """How the tensors of transformers' LlamaForCausalLM make ours; raises ConversionError."""
    # Some files hold a tied head as well; the embedding is what it is tied to.
    drop = [_TIED_HEAD] if architecture.tie_embeddings else []
    return plan_union(load_spec("llama"), files.tensors, wanted, drop=drop, where=str(where))


def architecture_tensors(architecture: Architecture, dtype: str) -> dict[str, TensorSpec]:
    """The logical tensors of the built-in model, under the names of a checkpoint."""
    found = {f"model.{name}": t for name, t in architecture.hf_tensors(dtype).items()}
    return {name: TensorSpec(name, t.dtype, t.shape) for name, t in found.items()}


def read_architecture(source: Path) -> Architecture:
    """What the ``config.json`` of a folder, or beside a file, describes.

    Raises:
        ArchitectureError: it is not what the built-in model can be.
        CheckpointError: it is missing or no configuration.
    """
    path = (source if source.is_dir() else source.parent) / CONFIG_NAME
    return from_hf_config(_read_json(path), str(path))


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes: no config.json")
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: put the config.json that belongs to the tensors beside them"
        ) from None
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is not JSON: {e}") from None


def _copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    """The file under the name that transformers looks for, and what lies beside it."""
    write_durable(folder / _TOKENIZER_FILES[0], tokenizer.read_bytes())
    for name in _TOKENIZER_FILES[1:]:
        if tokenizer.with_name(name).is_file():
            write_durable(folder / name, tokenizer.with_name(name).read_bytes())
