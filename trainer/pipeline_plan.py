"""How layers and micro-batches divide over pipeline stages: arithmetic only, no torch.

Stage s of n runs on pipeline rank s mod pp: one stage per rank for 1F1B, several for the schedules
that interleave. The first stage has the embedding, the last one the final norm and the head.
"""

from dataclasses import dataclass

from everstep.trainer.config import AUTO, ModelConfig, ParallelConfig, PipelineSchedule
from everstep.trainer.errors import ConfigError
from everstep.trainer.model_shape import ModelShape

_WANTED_ROUNDS = 2
"""``data.micro_batch: auto`` makes at least this many micro-batches per pipeline rank."""


@dataclass(frozen=True, kw_only=True)
class StageSpan:
    """What one pipeline stage computes."""

    index: int
    layers: range
    first: bool
    """It begins with the embedding."""
    last: bool
    """It ends with the final norm and the head."""


def count_stages(parallel: ParallelConfig, pp: int) -> int:
    """Stages of the whole pipeline; 1 without one."""
    if pp == 1:
        return 1
    if parallel.stages_per_rank != AUTO:
        return pp * parallel.stages_per_rank
    return pp * (1 if parallel.pipeline_schedule == "1f1b" else 2)


def split_stages(shape: ModelShape, seq_len: int, n_stages: int) -> list[StageSpan]:
    """The stages of a model; ``shape.layers`` is at least ``n_stages``."""
    layers = split_layers(shape.layers, n_stages, head_in_layers(shape, seq_len))
    last = n_stages - 1
    return [
        StageSpan(index=index, layers=part, first=index == 0, last=index == last)
        for index, part in enumerate(layers)
    ]


def head_in_layers(shape: ModelShape, seq_len: int) -> float:
    """Multiplications per token of the output head, as a fraction of those of one layer.

    The embedding is a lookup and costs nothing in comparison.
    """
    scores = seq_len * shape.heads * shape.head_dim  # causal: half of the keys, keys and values
    return shape.vocab_size * shape.dim / (shape.layer_matrices + scores)


def split_layers(layers: int, stages: int, head: float) -> list[range]:
    """Consecutive layers for each stage, at least one, so that the slowest stage is fast.

    ``head`` is what the last stage computes besides, in layers. Where stages cannot be equal, later
    ones get the larger share: earlier ones keep the activations of more micro-batches.
    """
    if stages == 1:
        return [range(layers)]
    others = stages - 1

    def slowest(in_last: int) -> tuple[float, int]:
        return max(-(-(layers - in_last) // others), in_last + head), -in_last

    in_last = min(range(1, layers - others + 1), key=slowest)
    base, larger = divmod(layers - in_last, others)
    sizes = [base + (index >= others - larger) for index in range(others)] + [in_last]
    ends = [sum(sizes[: index + 1]) for index in range(stages)]
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def pick_micro_batch(schedule: PipelineSchedule, per_rank: int, pp: int) -> int:
    """The micro-batch size that ``data.micro_batch: auto`` stands for in a pipeline.

    The largest one that makes twice as many micro-batches as pipeline ranks, so that at most a
    third of the step is bubble, else the one that makes the most micro-batches.
    """
    counts = [n for n in range(pp, per_rank + 1) if per_rank % n == 0 and _fits(schedule, n, pp)]
    if not counts:
        raise ConfigError(
            f"mesh.pp={pp} needs at least {pp} micro-batches per step, but the {per_rank} samples "
            "of each data-parallel rank cannot be divided into that many: raise data.global_batch "
            f"to a multiple of {pp} samples per data-parallel rank"
        )
    enough = [n for n in counts if n >= _WANTED_ROUNDS * pp]
    return per_rank // (min(enough) if enough else max(counts))


def check_micro_batches(schedule: PipelineSchedule, n_micro_batches: int, pp: int) -> None:
    """Raise ConfigError for a number of micro-batches that the schedule cannot run."""
    if n_micro_batches < pp:
        raise ConfigError(
            f"mesh.pp={pp} needs at least {pp} micro-batches per step, but data.micro_batch makes "
            f"{n_micro_batches}: use a smaller data.micro_batch, or auto, or raise "
            "data.global_batch"
        )
    if not _fits(schedule, n_micro_batches, pp):
        raise ConfigError(
            f"parallel.pipeline_schedule={schedule} runs micro-batches in rounds of mesh.pp={pp} "
            f"or a few more, and {n_micro_batches} cannot be divided into equal rounds: choose "
            f"data.micro_batch and data.global_batch so that there is a multiple of {pp}"
        )


def check_stages(model: ModelConfig, parallel: ParallelConfig, pp: int) -> None:
    """Raise ConfigError for a pipeline over ``pp`` ranks that cannot be built."""
    schedule, per_rank = parallel.pipeline_schedule, parallel.stages_per_rank
    if model.factory is not None:
        raise ConfigError(
            f"mesh.pp={pp} works with the built-in model only, and model.factory="
            f"{model.factory!r} is your own: use mesh.pp=1 with mesh.dp_shard"
        )
    if schedule == "1f1b" and per_rank not in (AUTO, 1):
        raise ConfigError(
            f"parallel.stages_per_rank={per_rank} needs a schedule that interleaves stages, and "
            "parallel.pipeline_schedule=1f1b runs one per rank: choose interleaved or zero_bubble"
        )
    if schedule == "zero_bubble" and parallel.compile:
        raise ConfigError(
            "parallel.pipeline_schedule=zero_bubble computes the gradients of weights apart from "
            "those of activations, which parallel.compile=true does not allow: set it to false, or "
            "choose 1f1b or interleaved"
        )
    n_stages = count_stages(parallel, pp)
    if model.layers < n_stages:
        raise ConfigError(
            f"model.layers={model.layers} cannot be divided over {n_stages} pipeline stages "
            f"(mesh.pp={pp} x {n_stages // pp} per rank): use fewer stages or more layers"
        )


def _fits(schedule: PipelineSchedule, n_micro_batches: int, pp: int) -> bool:
    """Whether micro-batches make equal rounds, as torch's interleaved schedules need."""
    return schedule == "1f1b" or n_micro_batches % max(1, n_micro_batches // pp) == 0
