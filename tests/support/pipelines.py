"""A tiny run through ``TorchEngine`` on any layout, pipelines included."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from everstep.trainer.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from everstep.trainer.data import Corpus, TrainStream, held_out_batches
from everstep.trainer.data.tokenizer import BytesTokenizer
from everstep.trainer.engine import TorchEngine, sum_over_ranks
from everstep.trainer.mesh_shape import MeshShape, check_config, settle_micro_batch
from everstep.trainer.sample import generate
from tests.support.corpora import counting_corpus


def easy_corpus() -> Corpus:
    """Tokens that are easy to learn, in documents of about ten of them."""
    random = np.random.default_rng(0)
    tokens = (random.integers(0, 7, 7000) ** 2).astype(np.uint32)
    tokens[random.random(tokens.size) < 0.1] = BytesTokenizer().eos_id
    corpus = counting_corpus(0)
    (part,) = corpus.parts
    part = replace(part, tokens_train=tokens[:6000], tokens_held_out=tokens[6000:])
    return replace(corpus, parts=(part,))


@dataclass(frozen=True, kw_only=True)
class PipelineRun:
    """What to train; data and global batch are the same on every layout."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    steps: int = 20
    layers: int = 4
    dim: int = 32
    global_batch: int = 16
    micro_batch: int | None = None
    kv_heads: int = 2
    tie: bool = False
    document_mask: bool = False
    parallel: dict[str, object] = field(default_factory=dict)

    @property
    def shape(self) -> MeshShape:
        return MeshShape(
            pp=self.pp, dp_replicate=self.dp_replicate, dp_shard=self.dp_shard, tp=self.tp
        )

    @property
    def on_one_rank(self) -> "PipelineRun":
        """The same training without any parallelism, in fp32 and one pass per step."""
        return replace(self, pp=1, dp_replicate=1, dp_shard=1, tp=1, micro_batch=None, parallel={})

    @property
    def config(self) -> RunConfig:
        config = RunConfig(
            seed=3,
            train=TrainConfig(steps=self.steps),
            model=ModelConfig(
                dim=self.dim,
                layers=self.layers,
                heads=4,
                kv_heads=self.kv_heads,
                dropout=0.1,
                tie_embeddings=self.tie,
            ),
            data=DataConfig(
                seq_len=16,
                global_batch=self.global_batch,
                micro_batch=self.micro_batch or "auto",
                held_out=0.1,
                document_mask=self.document_mask,
            ),
            optim=OptimConfig(lr=3e-3, warmup_steps=4, clip_norm=0.5),
            mesh=MeshConfig(
                pp=self.pp, dp_replicate=self.dp_replicate, dp_shard=self.dp_shard, tp=self.tp
            ),
            parallel=ParallelConfig.model_validate(self.parallel),
        )
        check_config(config, self.shape)
        return settle_micro_batch(config, self.shape)


class Trainer:
    """What one rank trains with, as ``worker_main`` builds it."""

    def __init__(self, run: PipelineRun, rank: int) -> None:
        self.run, self.config = run, run.config
        self.coordinate = run.shape.coordinate(rank)
        self.dp_rank = self.coordinate["dp_replicate"] * run.dp_shard + self.coordinate["dp_shard"]
        self.corpus = easy_corpus()
        self.engine = TorchEngine(
            self.config,
            run.shape,
            torch.device("cpu"),
            self.corpus.vocab_size,
            self.corpus.tokenizer.eos_id if run.document_mask else None,
        )
        self.stream = TrainStream(
            self.corpus, self.config.data, self.config.seed, self.dp_rank, run.shape.dp
        )

    def step(self) -> tuple[float, float]:
        """One update: mean loss in nats, gradient norm before clipping."""
        loss = self.engine.forward_backward(self.stream.next_step())
        (total,) = sum_over_ranks(loss[None], self.run.tp)
        data = self.config.data
        return total / (data.global_batch * data.seq_len), self.engine.apply_gradients()

    def evaluate(self) -> float:
        """Mean token loss on the held-out split."""
        batches = held_out_batches(
            self.corpus, self.config.data, 2, self.dp_rank, self.run.shape.dp
        )
        total, tokens = sum_over_ranks(self.engine.evaluate(batches), self.run.tp)
        return total / tokens

    def write(self, n_tokens: int) -> list[int]:
        """Text from the model, as tokens."""
        return generate(
            self.engine.logits_at,
            [5, 6, 7],
            n_tokens,
            0.8,
            5,
            self.config.data.seq_len,
            self.corpus.vocab_size,
            tp=self.run.tp,
        )


@dataclass(frozen=True)
class PipelineResult:
    """Of every step mean loss and gradient norm; then evaluation loss and text."""

    losses: list[float]
    norms: list[float]
    eval_loss: float
    text: list[int]
    parameters: int


def train_pipeline(rank: int, world_size: int, run: PipelineRun) -> PipelineResult:
    """Train, evaluate in between and at the end, write; a function for ``run_ranks``."""
    trainer = Trainer(run, rank)
    results = []
    for step in range(run.steps):
        results.append(trainer.step())
        if step == 1:
            trainer.evaluate()
    losses, norms = zip(*results, strict=True)
    return PipelineResult(
        list(losses), list(norms), trainer.evaluate(), trainer.write(8), trainer.engine.parameters
    )
