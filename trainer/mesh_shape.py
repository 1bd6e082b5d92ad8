"""The shape of the device mesh and how batches divide over it: arithmetic only, no torch.

Ranks are numbered row-major over the axes (pp, dp_replicate, dp_shard, tp): tp neighbours are
consecutive ranks, so that the axis with the most traffic stays inside a host.
"""

import difflib
import math
import re
from dataclasses import dataclass

from everstep.trainer.config import AUTO, DataConfig, MeshConfig, RunConfig
from everstep.trainer.errors import ConfigError
from everstep.trainer.model_shape import resolve_model
from everstep.trainer.pipeline_plan import check_micro_batches, check_stages, pick_micro_batch

AXES = ("pp", "dp_replicate", "dp_shard", "tp")
BYTES_VOCAB = 257
"""Ids of the 'bytes' tokenizer: 256 byte values and the end of a document."""
SINKS = ("jsonl", "tensorboard")
_OBJECT_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Sizes of the mesh axes, all of them known."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Sizes in the order of ``AXES``."""
        return (self.pp, self.dp_replicate, self.dp_shard, self.tp)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return math.prod(self.sizes)

    @property
    def dp(self) -> int:
        """Ranks that see different data: dp_replicate x dp_shard."""
        return self.dp_replicate * self.dp_shard

    def coordinate(self, rank: int) -> dict[str, int]:
        """Axis -> index of a rank on it."""
        if not 0 <= rank < self.world_size:
            raise ConfigError(
                f"rank {rank} is outside of {self}, which has ranks 0 to {self.world_size - 1}"
            )
        index: dict[str, int] = {}
        for axis, size in reversed(list(zip(AXES, self.sizes, strict=True))):
            rank, index[axis] = divmod(rank, size)
        return {axis: index[axis] for axis in AXES}

    def __str__(self) -> str:
        sizes = zip(AXES, self.sizes, strict=True)
        axes = [f"{axis} {size}" for axis, size in sizes if size > 1]
        return f"mesh {' x '.join(axes)}" if axes else "a single rank"


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How the global batch is divided; all in samples, except ``accumulation``."""

    per_rank: int
    micro_batch: int
    accumulation: int
    """Forward and backward passes per optimizer update."""


def resolve_mesh(mesh: MeshConfig, world_size: int) -> MeshShape:
    """Fill in ``dp_shard: auto`` and check that the mesh has exactly ``world_size`` ranks."""
    _check_built(mesh)
    others = _others(mesh)
    if mesh.dp_shard == AUTO:
        if world_size % others:
            near = others * (world_size // others) or others
            raise ConfigError(
                f"the mesh ({_asked(mesh)}) needs a multiple of {others} ranks, but there "
                f"{_are(world_size)}: start {near} (--nproc {near}) or change "
                "mesh.pp, mesh.dp_replicate and mesh.tp"
            )
        dp_shard = world_size // others
    else:
        dp_shard = mesh.dp_shard
        needed = others * dp_shard
        if needed != world_size:
            other = "or change the mesh"
            if world_size % others == 0:
                other = f"or set mesh.dp_shard={world_size // others} or auto"
            raise ConfigError(
                f"the mesh ({_asked(mesh)}) needs {needed} rank{'s' * (needed > 1)}, but there "
                f"{_are(world_size)}: start {needed} (--nproc {needed}) {other}"
            )
    return MeshShape(pp=mesh.pp, dp_replicate=mesh.dp_replicate, dp_shard=dp_shard, tp=mesh.tp)


def world_size_of(mesh: MeshConfig, nproc: int | None, gpus: int) -> int:
    """Ranks that this command starts; ``gpus`` are those of this host, or of the cluster joined.

    ``nproc`` where the user gave it; else what an explicit mesh asks for; else, with
    ``dp_shard: auto``, as many as fill the GPUs, and one shard where there are none.
    """
    if nproc is not None:
        return nproc
    if mesh.dp_shard != AUTO:
        return _others(mesh) * mesh.dp_shard
    return _others(mesh) * max(1, gpus // _others(mesh))


def local_device(device: str, gpus: int, world_size: int, where: str = "this host") -> str:
    """'cpu' or 'cuda' for ranks that share ``gpus``; each needs a GPU of its own.

    ``auto`` with too few GPUs means the CPU; asking for ``cuda`` then is a ConfigError.
    """
    if device == "cpu" or (device == AUTO and gpus < world_size):
        return "cpu"
    if gpus < world_size:
        raise ConfigError(
            f"parallel.device=cuda with {world_size} ranks needs a GPU for each, but {where} "
            f"has {gpus}: use a smaller mesh, or parallel.device=cpu"
        )
    return "cuda"


def plan_batches(data: DataConfig, dp: int) -> BatchPlan:
    """Divide the global batch over ``dp`` ranks and into micro-batches."""
    if data.global_batch % dp:
        raise ConfigError(
            f"data.global_batch={data.global_batch} cannot be divided over {dp} data-parallel "
            f"ranks: choose a multiple of {dp}, such as {_round_up(data.global_batch, dp)}"
        )
    per_rank = data.global_batch // dp
    micro_batch = per_rank if data.micro_batch == AUTO else data.micro_batch
    if per_rank % micro_batch:
        fitting = max(size for size in range(1, micro_batch) if per_rank % size == 0)
        raise ConfigError(
            f"data.micro_batch={micro_batch} does not divide the {per_rank} samples of each rank "
            f"(data.global_batch={data.global_batch} over {dp} ranks): choose a divisor such as "
            f"{fitting}, or auto"
        )
    return BatchPlan(
        per_rank=per_rank, micro_batch=micro_batch, accumulation=per_rank // micro_batch
    )


def settle_micro_batch(config: RunConfig, shape: MeshShape) -> RunConfig:
    """``config`` with ``data.micro_batch: auto`` decided where a pipeline has a say in it."""
    if shape.pp == 1 or config.data.micro_batch != AUTO:
        return config
    per_rank = plan_batches(config.data, shape.dp).per_rank
    size = pick_micro_batch(config.parallel.pipeline_schedule, per_rank, shape.pp)
    data = config.data.model_copy(update={"micro_batch": size})
    return config.model_copy(update={"data": data})


def check_config(config: RunConfig, shape: MeshShape) -> None:
    """Check what several sections have to agree on, for a resolved mesh; raises ConfigError."""
    batches = plan_batches(settle_micro_batch(config, shape).data, shape.dp)
    if shape.pp > 1:
        check_stages(config.model, config.parallel, shape.pp)
        check_micro_batches(config.parallel.pipeline_schedule, batches.accumulation, shape.pp)
    _check_model(config, shape.tp)
    _check_names(config)
    train = config.train
    if train.eval_every and not train.eval_batches:
        raise ConfigError(
            f"train.eval_every={train.eval_every} asks for evaluations, but train.eval_batches=0 "
            "allows none: set one of them"
        )
    if train.eval_every and config.data.held_out == 0:
        raise ConfigError(
            f"train.eval_every={train.eval_every} asks for evaluations, but data.held_out=0 keeps "
            "no text for them: set data.held_out=0.02 or train.eval_every=0"
        )


def _check_model(config: RunConfig, tp: int) -> None:
    model = config.model
    bytes_tokenizer = config.data.tokenizer == "bytes"
    # A tokenizer.json is read when the data is opened; until then, any embedding is large enough.
    size = resolve_model(model, BYTES_VOCAB if bytes_tokenizer else 1)
    if model.factory is None and model.factory_args:
        raise ConfigError(
            "model.factory_args is given without model.factory: name the function that takes them, "
            "as 'pkg.module:function'"
        )
    if model.factory is not None and config.data.document_mask:
        raise ConfigError(
            "data.document_mask=true works with the built-in model only, and model.factory="
            f"{model.factory!r} is your own: mask its attention there, and leave the key out"
        )
    if tp == 1:
        return
    if model.factory is not None:
        raise ConfigError(
            f"mesh.tp={tp} works with the built-in model only, and model.factory={model.factory!r} "
            "is your own: use mesh.tp=1 with mesh.dp_shard"
        )
    divided = {
        "data.seq_len": config.data.seq_len,
        "model.heads": size.heads,
        "model.kv_heads": size.kv_heads,
        "model.ffn_dim": size.ffn_dim,
    }
    if model.vocab_size != AUTO or bytes_tokenizer:
        divided["model.vocab_size"] = size.vocab_size
    for key, value in divided.items():
        if value % tp:
            raise ConfigError(
                f"{key}={value} cannot be divided over mesh.tp={tp} ranks: choose a multiple of "
                f"{tp}, or another mesh.tp"
            )


def _check_names(config: RunConfig) -> None:
    factory = config.model.factory
    if factory is not None and not _OBJECT_NAME.fullmatch(factory):
        raise ConfigError(
            f"model.factory: got {factory!r}, expected 'pkg.module:function', the function that "
            "builds your model"
        )
    for sink in config.metrics.sinks:
        if sink not in SINKS and not _OBJECT_NAME.fullmatch(sink):
            near = difflib.get_close_matches(sink, SINKS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"metrics.sinks: got {sink!r}, expected {', '.join(map(repr, SINKS))} or "
                f"'pkg.module:factory'{hint}"
            )


def _check_built(mesh: MeshConfig) -> None:
    kinds = {"cp": "context", "ep": "expert"}
    for axis, kind in kinds.items():
        size = getattr(mesh, axis)
        if size > 1:
            raise ConfigError(
                f"mesh.{axis}={size}: {kind} parallelism is not built yet; leave mesh.{axis} at 1 "
                "and use pp, dp_replicate, dp_shard and tp"
            )


def _others(mesh: MeshConfig) -> int:
    """Ranks of all axes but dp_shard."""
    return mesh.pp * mesh.dp_replicate * mesh.tp


def _asked(mesh: MeshConfig) -> str:
    axes = {axis: getattr(mesh, axis) for axis in AXES}
    return " x ".join(f"{axis} {size}" for axis, size in axes.items() if size != 1) or "one rank"


def _are(world_size: int) -> str:
    return "is only 1" if world_size == 1 else f"are {world_size}"


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
