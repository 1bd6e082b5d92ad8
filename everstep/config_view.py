"""``everstep config show`` and ``everstep config list``: text only, ready to be piped."""

from collections.abc import Iterator, Sequence

from everstep.machine import count_gpus
from everstep.trainer.config import RunConfig
from everstep.trainer.config_load import dump_config, load_config, packaged_configs
from everstep.trainer.mesh_shape import (
    BYTES_VOCAB,
    check_config,
    plan_batches,
    resolve_mesh,
    settle_micro_batch,
    world_size_of,
)
from everstep.trainer.model_shape import ModelShape, resolve_model
from everstep.trainer.pipeline_plan import count_stages, split_stages
from everstep.words import count_words, plural


def show_config(ref: str, overrides: Sequence[str], nproc: int | None) -> str:
    """The resolved run as YAML that loads again, below comments on what follows from it.

    Raises ConfigError, also for a mesh that does not fit ``nproc`` ranks.
    """
    config = load_config(ref, overrides)
    source = f"{ref} and {plural(len(overrides), 'override')}" if overrides else ref
    world_size = world_size_of(config.mesh, nproc, count_gpus())
    header = [f"everstep config, resolved from {source}", *describe_run(config, world_size)]
    return "".join(f"# {line}\n" for line in header) + dump_config(config, mask_secrets=True)


def describe_run(config: RunConfig, world_size: int) -> Iterator[str]:
    """What a config amounts to on ``world_size`` ranks, one fact per line."""
    shape = resolve_mesh(config.mesh, world_size)
    check_config(config, shape)
    config = settle_micro_batch(config, shape)
    data, batches = config.data, plan_batches(config.data, shape.dp)
    yield f"ranks:      {world_size} ({shape})" if world_size > 1 else "ranks:      1"
    micro_batches = plural(batches.accumulation, "micro-batch").replace("chs", "ches")
    yield (
        f"batch:      {data.global_batch} samples of {data.seq_len} tokens = "
        f"{plural(shape.dp, 'data-parallel rank')} x {micro_batches} of {batches.micro_batch}"
    )
    tokens = config.train.steps * data.global_batch * data.seq_len
    yield f"run:        {config.train.steps} steps, {count_words(tokens)} tokens"
    model = _model_shape(config)
    if model is None:
        yield f"parameters: known once {config.model.factory} has built the model"
        return
    yield f"parameters: {count_words(model.parameters)}"
    if shape.pp > 1:
        spans = split_stages(model, data.seq_len, count_stages(config.parallel, shape.pp))
        layers = ", ".join(plural(len(span.layers), "layer") for span in spans)
        yield f"stages:     {layers}; stage s on pipeline rank s mod {shape.pp}"


def list_configs() -> str:
    """Name and first comment line of every packaged config."""
    packaged = packaged_configs()
    width = max(map(len, packaged), default=0)
    lines = []
    for name, file in packaged.items():
        first, _, _ = file.read_text(encoding="utf-8").partition("\n")
        lines.append(f"{name:{width}}  {first.removeprefix('#').strip()}\n")
    return "".join(lines)


def _model_shape(config: RunConfig) -> ModelShape | None:
    """Sizes of the built-in model; None for a user's."""
    if config.model.factory is not None:
        return None
    if config.data.tokenizer == "bytes":
        vocab_size = BYTES_VOCAB
    elif config.model.vocab_size != "auto":
        vocab_size = config.model.vocab_size
    else:
        from everstep.trainer.data import vocab_size_of

        vocab_size = vocab_size_of(config.data)
    return resolve_model(config.model, vocab_size)
