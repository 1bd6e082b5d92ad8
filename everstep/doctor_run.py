"""The part of ``everstep doctor CONFIG`` that asks whether this machine can run that config."""

import shlex
from collections.abc import Sequence

from everstep.doctor import (
    RUN_ROOT,
    Facts,
    Finding,
    Status,
    diagnose,
    gather,
    report,
    report_console,
)
from everstep.doctor_snapshots import diagnose_snapshots
from everstep.trainer.config import RunConfig
from everstep.trainer.config_load import load_config
from everstep.trainer.errors import ConfigError, DataError
from everstep.trainer.mesh_shape import (
    BYTES_VOCAB,
    MeshShape,
    check_config,
    local_device,
    resolve_mesh,
    world_size_of,
)
from everstep.trainer.model_shape import resolve_model
from everstep.trainer.snapshot_memory import SAVED_BYTES_PER_PARAMETER, snapshot_memory
from everstep.words import size_words

TRAINED_BYTES_PER_PARAMETER = 16
"""fp32 parameter, gradient and both moments of AdamW."""


def examine_run(ref: str, overrides: Sequence[str]) -> int:
    """Report on the machine and on a config on it; returns the exit code."""
    config = load_config(ref, overrides)
    facts = gather(RUN_ROOT)
    findings = [*diagnose(facts), *diagnose_run(config, facts)]
    return report(findings, report_console(), shlex.join(["everstep", "train", ref, *overrides]))


def diagnose_run(config: RunConfig, facts: Facts) -> list[Finding]:
    """Judge whether the local launcher can run ``config`` here; activations are not estimated."""
    tokenizer, vocab_size = _tokenizer(config)
    findings = [tokenizer, *_sinks(config, facts)]
    try:
        world_size = world_size_of(config.mesh, None, facts.visible_gpus)
        shape = resolve_mesh(config.mesh, world_size)
        check_config(config, shape)
        device = local_device(config.parallel.device, facts.visible_gpus, world_size)
    except ConfigError as error:
        return [Finding("config", Status.FAIL, config.name, str(error)), *findings]
    findings.insert(0, _ranks(config, shape, device, facts))
    if config.model.factory is None and vocab_size is not None:
        try:
            model = resolve_model(config.model, vocab_size)
            snapshots = snapshot_memory(config, model, shape, shape.world_size)
        except ConfigError as error:
            return [Finding("config", Status.FAIL, config.name, str(error)), *findings]
        training = _training_memory(model.parameters, shape, device, facts)
        findings += [training, _checkpoint_space(model.parameters, config, facts)]
        if snapshots is not None:
            on_host = 0 if device == "cuda" else _host_bytes(model.parameters, shape)
            findings += diagnose_snapshots(config, snapshots, shape, on_host, device, facts)
    return findings


def _ranks(config: RunConfig, shape: MeshShape, device: str, facts: Facts) -> Finding:
    ranks = shape.world_size
    found = f"{config.name}: {f'{ranks} ranks, {shape}' if ranks > 1 else '1 rank'}, on {device}"
    if device == "cpu" and facts.visible_gpus:
        advice = (
            f"each rank needs a GPU and there are {facts.visible_gpus}: fewer ranks would use them"
        )
        return Finding("config", Status.WARN, found, advice)
    if device == "cpu" and ranks > 4 * facts.cpu.cores:
        advice = f"{facts.cpu.cores} cores will be slow for {ranks} ranks: use a smaller mesh"
        return Finding("config", Status.WARN, found, advice)
    return Finding("config", Status.OK, found)


def _tokenizer(config: RunConfig) -> tuple[Finding, int | None]:
    """The finding, and the number of token ids where the tokenizer can be opened."""
    name = config.data.tokenizer
    if name == "bytes":
        return Finding("tokenizer", Status.OK, "bytes"), BYTES_VOCAB
    from everstep.trainer.data import vocab_size_of

    try:
        vocab_size = vocab_size_of(config.data)
    except DataError as error:
        return Finding("tokenizer", Status.FAIL, name, str(error)), None
    return Finding("tokenizer", Status.OK, f"{name}: {vocab_size} ids"), vocab_size


def _sinks(config: RunConfig, facts: Facts) -> list[Finding]:
    if "tensorboard" in config.metrics.sinks and facts.packages["tensorboard"] is None:
        advice = "pip install 'everstep[tensorboard]', or leave it out of metrics.sinks"
        return [Finding("metrics", Status.FAIL, "tensorboard is not installed", advice)]
    return []


def _training_memory(parameters: int, shape: MeshShape, device: str, facts: Facts) -> Finding:
    per_replica = parameters * TRAINED_BYTES_PER_PARAMETER
    if device == "cuda":
        per_rank = per_replica // (shape.pp * shape.dp_shard * shape.tp)
        memories = [gpu.memory_bytes for gpu in facts.gpus if gpu.memory_bytes]
        found = f"{size_words(per_rank)} of state per GPU, and activations"
        have, need = min(memories, default=None), per_rank
    else:
        need = _host_bytes(parameters, shape)
        found = f"{size_words(need)} of state in all ranks, and activations"
        available = facts.memory.available_bytes
        have = min(available, facts.memory.limit_bytes or available)
    if have is not None and need > 0.8 * have:
        advice = f"there are {size_words(have)}: use a smaller model, or shard over more ranks"
        return Finding("training memory", Status.FAIL, found, advice)
    return Finding("training memory", Status.OK, found)


def _host_bytes(parameters: int, shape: MeshShape) -> int:
    return parameters * TRAINED_BYTES_PER_PARAMETER * shape.dp_replicate


def _checkpoint_space(parameters: int, config: RunConfig, facts: Facts) -> Finding:
    one = parameters * SAVED_BYTES_PER_PARAMETER
    kept = config.checkpoint.keep
    found = f"{size_words(one)} per checkpoint, {kept} kept"
    if one * (kept + 1) > facts.disk.free_bytes:  # the new one is complete before an old one goes
        advice = (
            f"{size_words(facts.disk.free_bytes)} are free: lower checkpoint.keep, or --run-dir"
        )
        return Finding("checkpoint space", Status.FAIL, found, advice)
    return Finding("checkpoint space", Status.OK, found)
