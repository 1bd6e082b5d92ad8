"""Training begins with weights from elsewhere, on any layout, and goes on where these were."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.convert.hf import export_hf
from everstep.checkpoint.open_place import open_place
from everstep.checkpoint.torch_layout import live_tensor
from everstep.checkpoint.torch_state import named_tensors
from everstep.trainer.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from everstep.trainer.data import MicroBatch, TrainStream
from everstep.trainer.engine import TorchEngine, sum_over_ranks
from everstep.trainer.init_from import init_from
from everstep.trainer.mesh_shape import MeshShape, settle_micro_batch
from tests.support.corpora import counting_corpus
from tests.support.spawn import run_ranks

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(300)]

VOCAB = 130
TOKENS = 12 * 8
STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the mesh axes."""

    pp: int = 1
    dp_shard: int = 1
    tp: int = 1

    @property
    def shape(self) -> MeshShape:
        return MeshShape(pp=self.pp, dp_replicate=1, dp_shard=self.dp_shard, tp=self.tp)


def config_of(shape: MeshShape, tie: bool, init: str | None) -> RunConfig:
    """Widths that 2 does not divide evenly everywhere; no dropout."""
    model = ModelConfig(
        dim=20,
        layers=2,
        heads=2,
        kv_heads=2,
        ffn_dim=38,
        vocab_size=VOCAB,
        tie_embeddings=tie,
        init_from=init,
    )
    config = RunConfig(
        seed=3,
        train=TrainConfig(steps=9),
        model=model,
        data=DataConfig(seq_len=8, global_batch=12),
        optim=OptimConfig(lr=1e-2),
    )
    return settle_micro_batch(config, shape)


def train(
    rank: int, world_size: int, layout: Layout, tie: bool, init: str | None, save_to: str | None
) -> tuple[list[float], dict[str, tuple[Any, Any]]]:
    """Losses of the first steps; the boxes that this rank began with. A function for ranks."""
    config = config_of(layout.shape, tie, init)
    engine = TorchEngine(config, layout.shape, torch.device("cpu"), VOCAB)
    if init is not None:
        init_from(engine.model, config, VOCAB)
    held = {
        name: (live.fragment.box, live.local.numpy().copy())
        for name, tensor in named_tensors(engine.model).items()
        for live in [live_tensor(name, tensor)]
    }
    dp_rank = layout.shape.coordinate(rank)["dp_shard"]
    stream = TrainStream(counting_corpus(700), config.data, 3, dp_rank, layout.dp_shard)
    losses = []
    for _ in range(STEPS):
        loss_sum = engine.forward_backward([_easy(batch) for batch in stream.next_step()])
        (total,) = sum_over_ranks(loss_sum[None], layout.tp)
        losses.append(total / TOKENS)
        engine.apply_gradients()
    if save_to is not None:
        with Checkpointer(save_to) as checkpointer:
            checkpointer.save(STEPS, engine.state(stream))
    return losses, held


def _easy(batch: MicroBatch) -> MicroBatch:
    """Tokens that a few steps learn something of."""
    return replace(batch, tokens_BL=batch.tokens_BL % 7, targets_BL=batch.targets_BL % 7)


@pytest.fixture(
    scope="module",
    params=[pytest.param(False, marks=pytest.mark.slow), True],
    ids=["untied", "tied"],
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint after some steps, what transformers gets of it, and how one rank goes on."""
    folder, tie = tmp_path_factory.mktemp("trained"), bool(request.param)
    [(losses, _)] = run_ranks(train, 1, Layout(), tie, None, str(folder / "c"))
    with open_place(folder / "c").open() as reader:
        export_hf(reader, folder / "hf", max_shard_bytes=9000)
    [(again, _)] = run_ranks(train, 1, Layout(), tie, str(folder / "hf"), None)
    assert again[0] < 0.99 * losses[0]  # it has learnt something
    return folder, tie, again


IN_EVERY_RUN = [("hf", Layout(dp_shard=2)), ("c", Layout(tp=2))]
SLOW = [
    ("hf", Layout(tp=2)),
    ("c", Layout(dp_shard=2)),
    ("hf", Layout(pp=2)),
    ("c", Layout(pp=2)),
    ("hf", Layout(dp_shard=2, tp=2)),
    ("hf", Layout(pp=2, dp_shard=2, tp=2)),
]


@pytest.mark.parametrize(
    ("source", "layout"),
    [*IN_EVERY_RUN, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
    ids=str,
)
def test_any_layout_begins_with_the_same_weights(
    trained: tuple[Path, bool, list[float]], source: str, layout: Layout
) -> None:
    folder, tie, one_rank = trained
    ranks = layout.pp * layout.dp_shard * layout.tp
    results = run_ranks(train, ranks, layout, tie, str(folder / source), None)
    expected: dict[str, torch.Tensor] = {}
    for file in (folder / "hf").glob("*.safetensors"):
        expected |= load_file(file)
    seen = set()
    for losses, held in results:
        for name, (box, values) in held.items():
            index = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
            assert values.tobytes() == expected[name][index].numpy().tobytes()
            seen.add(name)
        for loss, wanted in zip(losses, one_rank, strict=True):
            assert math.isclose(loss, wanted, rel_tol=1e-5)
    assert seen == expected.keys()
