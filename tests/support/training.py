"""A tiny training run on any layout, for tests of parallelism."""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from everstep.trainer.config import ModelConfig, OptimConfig, ParallelConfig
from everstep.trainer.init import materialise
from everstep.trainer.loss import token_loss_sum
from everstep.trainer.mesh import build_mesh
from everstep.trainer.mesh_shape import MeshShape
from everstep.trainer.model import build_model, logits_of
from everstep.trainer.optim import build_optimizer, build_scheduler, clip_gradients
from everstep.trainer.parallelize import parallelize, set_gradient_sync

SEQ_LEN = 16
GLOBAL_BATCH = 8
VOCAB = 100


@dataclass(frozen=True, kw_only=True)
class TinyRun:
    """What to train and how; the global batches are the same for every layout."""

    steps: int = 20
    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    micro_batches: int = 1
    tie_embeddings: bool = False
    dropout: float = 0.1
    clip_norm: float = 0.5
    factory: str | None = None
    document_end: int | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def shape(self) -> MeshShape:
        return MeshShape(pp=1, dp_replicate=self.dp_replicate, dp_shard=self.dp_shard, tp=self.tp)

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(
            dim=32,
            layers=2,
            heads=4,
            kv_heads=2,
            dropout=self.dropout,
            tie_embeddings=self.tie_embeddings,
            factory=self.factory,
        )


@dataclass(frozen=True)
class TinyResult:
    """Mean loss in nats and gradient norm before clipping, of every step."""

    losses: list[float]
    norms: list[float]


def train_tiny(rank: int, world_size: int, run: TinyRun) -> TinyResult:
    """Train on this rank; a function for ``run_ranks``."""
    shape = run.shape
    mesh = build_mesh(shape, "cpu")
    model = build_model(
        run.model, vocab_size=VOCAB, seq_len=SEQ_LEN, seed=3, document_end=run.document_end
    )
    parallelize(model, mesh, shape, run.parallel)
    materialise(model, torch.device("cpu"), seed=3)
    optim = OptimConfig(lr=3e-3, warmup_steps=4)
    optimizer = build_optimizer(model, optim)
    scheduler = build_scheduler(optimizer, optim, run.steps)

    place = shape.coordinate(rank)
    dp_rank = place["dp_replicate"] * shape.dp_shard + place["dp_shard"]
    result = TinyResult([], [])
    for step in range(run.steps):
        tokens, samples = global_batch(step)
        own = slice(dp_rank * GLOBAL_BATCH // shape.dp, (dp_rank + 1) * GLOBAL_BATCH // shape.dp)
        loss_sum = torch.zeros((), dtype=torch.float64)
        micros = list(
            zip(
                tokens[own].chunk(run.micro_batches),
                samples[own].chunk(run.micro_batches),
                strict=True,
            )
        )
        for index, (micro_tokens, micro_samples) in enumerate(micros):
            set_gradient_sync(model, index == len(micros) - 1)
            logits = logits_of(model, micro_tokens[:, :-1], micro_samples)
            loss = token_loss_sum(logits, micro_tokens[:, 1:])
            (loss * shape.dp / (GLOBAL_BATCH * SEQ_LEN)).backward()
            loss_sum += loss.detach()
        result.norms.append(clip_gradients(model.parameters(), run.clip_norm))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        for axis in ("dp_replicate", "dp_shard"):
            dist.all_reduce(loss_sum, group=mesh.get_group(axis))
        result.losses.append(loss_sum.item() / (GLOBAL_BATCH * SEQ_LEN))
    return result


def global_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, L + 1), easy to learn, and the global indices (B,) of the samples of a step."""
    samples = np.arange(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
    rows = [np.random.default_rng(sample).integers(0, 7, SEQ_LEN + 1) ** 2 for sample in samples]
    return torch.from_numpy(np.stack(rows)), torch.from_numpy(samples)
