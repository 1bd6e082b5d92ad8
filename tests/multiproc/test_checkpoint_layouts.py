"""Real training saves and resumes: on its own layout bit for bit, on more or fewer ranks, too."""

import hashlib
import os
import random
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.torch_collective import ProcessGroupCollective
from everstep.checkpoint.torch_rng import derive_rng
from everstep.checkpoint.torch_state import State, optimizer_of, split_objects, tensors_of
from everstep.trainer.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from everstep.trainer.data import TrainStream
from everstep.trainer.engine import TorchEngine
from everstep.trainer.mesh_shape import MeshShape, settle_micro_batch
from tests.support.corpora import counting_corpus
from tests.support.format_reader import read_checkpoint
from tests.support.logical import digest, logical_digests
from tests.support.spawn import RankError, run_ranks

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(300)]

VOCAB = 130


@dataclass(frozen=True, kw_only=True)
class Run:
    """A tiny Llama on some layout; ``dim=20`` gives uneven shards nearly everywhere."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    tie: bool = False
    dim: int = 24
    layers: int = 2
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def shape(self) -> MeshShape:
        return MeshShape(
            pp=self.pp, dp_replicate=self.dp_replicate, dp_shard=self.dp_shard, tp=self.tp
        )

    @property
    def config(self) -> RunConfig:
        config = RunConfig(
            seed=3,
            train=TrainConfig(steps=8),
            model=ModelConfig(
                dim=self.dim,
                layers=self.layers,
                heads=2,
                kv_heads=2,
                ffn_dim=38,
                dropout=0.1,
                tie_embeddings=self.tie,
                vocab_size=VOCAB,
            ),
            data=DataConfig(seq_len=8, global_batch=12),
            optim=OptimConfig(lr=3e-3, warmup_steps=3),
            parallel=self.parallel,
        )
        return settle_micro_batch(config, self.shape)


class Trainer:
    """What one rank trains with, as ``worker_main`` builds it."""

    def __init__(self, run: Run, rank: int) -> None:
        config = run.config
        self.coordinate = run.shape.coordinate(rank)
        dp_rank = self.coordinate["dp_replicate"] * run.dp_shard + self.coordinate["dp_shard"]
        self.engine = TorchEngine(config, run.shape, torch.device("cpu"), VOCAB)
        corpus = counting_corpus(700)
        self.stream = TrainStream(corpus, config.data, 3, dp_rank, run.shape.dp)
        self.mesh = {axis: getattr(run.shape, axis) for axis in self.coordinate}
        derive_rng(0, 0, str(rank))

    @property
    def state(self) -> State:
        return self.engine.state(self.stream)

    def checkpointer(self, root: Path) -> Checkpointer:
        return Checkpointer(
            root,
            collective=ProcessGroupCollective(timeout_s=30),
            mesh=self.mesh,
            coordinate=self.coordinate,
        )

    def step(self) -> list[float]:
        """One update; also draws from every generator."""
        batches = [replace(b, **_small_tokens(b)) for b in self.stream.next_step()]
        loss = float(self.engine.forward_backward(batches))
        norm = self.engine.apply_gradients()
        return [loss, norm, random.random(), float(np.random.normal()), float(torch.rand(()))]

    def shards(self) -> dict[str, str]:
        """A digest of everything that this rank holds."""
        found = {n: digest(t.local) for n, t in tensors_of(self.state).items()}
        found["objects"] = hashlib.sha256(
            repr(split_objects(self.state)[0] | optimizer_of(self.state)).encode()
        ).hexdigest()
        return found

    def logical(self) -> dict[str, str]:
        """A digest of every logical tensor, whole, and of the data position."""
        return {**logical_digests(self.engine), "objects": self.objects()}

    def objects(self) -> str:
        """What is saved besides tensors."""
        return repr(split_objects(self.state)[0] | optimizer_of(self.state))


def _small_tokens(batch: Any) -> dict[str, Any]:
    return {
        "tokens_BL": batch.tokens_BL % VOCAB,
        "targets_BL": batch.targets_BL % VOCAB,
    }


LAYOUTS = {
    "1": Run(),
    "dp2": Run(dp_shard=2),
    "dp4 tied": Run(dp_shard=4, tie=True),
    "dp3 uneven": Run(dp_shard=3, dim=20),
    "hsdp2x2": Run(dp_replicate=2, dp_shard=2),
    "replicate2": Run(dp_replicate=2),
    "tp2": Run(tp=2),
    "dp2xtp2 uneven": Run(dp_shard=2, tp=2, dim=20),
    "dp2 recomputed bf16": Run(
        dp_shard=2, parallel=ParallelConfig(activation_checkpointing=True, precision="bf16")
    ),
}


def _save_go_on_and_resume(rank: int, world_size: int, run: Run, root: str) -> Any:
    """Two steps, a save, two more; then the same two again from the checkpoint."""
    first = Trainer(run, rank)
    with first.checkpointer(Path(root)) as checkpointer:
        assert checkpointer.load(first.state) == 0
        for _ in range(2):
            first.step()
        saved = first.shards()
        checkpointer.save(2, first.state)
        straight = [first.step() for _ in range(2)]
        again = Trainer(run, rank)
        assert again.shards() != saved
        assert checkpointer.load(again.state) == 3
        assert checkpointer.loaded is not None
        assert checkpointer.loaded.rng_restored
        loaded = again.shards()
        resumed = [again.step() for _ in range(2)]
    assert loaded == saved
    assert resumed == straight
    assert again.shards() == first.shards()
    return len(saved)


@pytest.mark.parametrize("run", LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_resumes_on_itself_bit_for_bit(tmp_path: Path, run: Run) -> None:
    world_size = run.shape.world_size
    held = run_ranks(_save_go_on_and_resume, world_size, run, str(tmp_path))
    assert held == [held[0]] * world_size
    with Checkpointer(tmp_path, read_only=True) as reader:
        manifest = reader.inspect()
    assert manifest is not None
    assert len(manifest.packs) == world_size
    sizes = [pack.data_bytes for pack in manifest.packs]
    assert max(sizes) - min(sizes) < 0.2 * max(sizes)


PIPELINES = {
    "pp2": Run(pp=2),
    "pp2 interleaved, tied": Run(
        pp=2, layers=4, tie=True, parallel=ParallelConfig(pipeline_schedule="interleaved")
    ),
    "pp2xdp2 zero bubble, bf16": Run(
        pp=2,
        dp_shard=2,
        layers=4,
        parallel=ParallelConfig(pipeline_schedule="zero_bubble", precision="bf16"),
    ),
    "pp2xdp3 uneven, tied": Run(pp=2, dp_shard=3, dim=20, tie=True),
}
SLOW_PIPELINES = {"pp2xdp3 uneven, tied"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in SLOW_PIPELINES else ()) for n in PIPELINES],
)
def test_a_pipeline_resumes_on_itself_and_saves_what_one_rank_saves(
    tmp_path: Path, name: str
) -> None:
    run = PIPELINES[name]
    run_ranks(_save_go_on_and_resume, run.shape.world_size, run, str(tmp_path / "pipeline"))
    one_rank = Run(layers=run.layers, dim=run.dim, tie=run.tie)
    run_ranks(_save_go_on_and_resume, 1, one_rank, str(tmp_path / "one rank"))
    with (
        Checkpointer(tmp_path / "pipeline", read_only=True) as of_pipeline,
        Checkpointer(tmp_path / "one rank", read_only=True) as of_one_rank,
    ):
        found, expected = of_pipeline.inspect(), of_one_rank.inspect()
    assert found is not None
    assert expected is not None
    rngs = {n for n in found.tensors if n.startswith("rng.pp")}
    assert len(rngs) == 3 * run.shape.world_size
    specs = {n: t.spec for n, t in found.tensors.items() if n not in rngs}
    assert specs == {n: t.spec for n, t in expected.tensors.items() if not n.startswith("rng.")}
    ours, theirs = found.objects["optimizer"]["groups"], expected.objects["optimizer"]["groups"]
    assert [sorted(g["params"]) for g in ours] == [sorted(g["params"]) for g in theirs]


def test_a_pipeline_may_become_one_rank_and_another_pipeline(tmp_path: Path) -> None:
    interleaved = ParallelConfig(pipeline_schedule="interleaved")
    runs = [
        Run(pp=2, layers=4, tie=True),
        Run(layers=4, tie=True),
        Run(pp=2, layers=4, tie=True, parallel=interleaved),
        Run(layers=4, tie=True),
    ]
    saved: dict[str, str] = {}
    for run in runs:
        results = run_ranks(_resume_train_save, run.shape.world_size, run, str(tmp_path))
        for found, _, _ in results:
            tensors = {n: d for n, d in found.items() if n != "objects"}
            assert not saved or tensors.items() <= saved.items()
        saved = {n: d for _, after, _ in results for n, d in after.items()}


def _resume_train_save(rank: int, world_size: int, run: Run, root: str) -> Any:
    trainer = Trainer(run, rank)
    with trainer.checkpointer(Path(root)) as checkpointer:
        step = checkpointer.load(trainer.state)
        found = trainer.logical()
        trainer.step()
        checkpointer.save(step, trainer.state)
        restored = checkpointer.loaded is not None and checkpointer.loaded.rng_restored
        return found, trainer.logical(), restored


def test_the_number_of_data_parallel_ranks_may_change(tmp_path: Path) -> None:
    runs = [
        Run(dp_shard=4, dim=20),
        Run(dp_shard=2, dim=20),
        Run(dim=20),
        Run(dp_shard=3, dim=20),
        Run(dp_replicate=2, dp_shard=2, dim=20),
    ]
    saved = None
    for run in runs:
        world_size = run.shape.world_size
        results = run_ranks(_resume_train_save, world_size, run, str(tmp_path))
        for found, _, restored in results:
            assert saved is None or found == saved
            assert not restored
        saved = results[0][1]
        assert all(after == saved for _, after, _ in results)
        assert _digests_of_another_reader(tmp_path).items() <= saved.items()


def _digests_of_another_reader(root: Path) -> dict[str, str]:
    """What somebody reads in the newest checkpoint who has FORMAT.md and no everstep."""
    _, tensors = read_checkpoint(max(root.glob("step-*")))
    assert sum(name.startswith("optimizer.") for name in tensors) > 20
    return {n: digest(torch.from_numpy(t)) for n, t in tensors.items() if n[:4] != "rng."}


def test_ranks_of_a_tensor_parallel_mesh_may_change_along_dp(tmp_path: Path) -> None:
    saved = None
    for run in (Run(dp_shard=2, tp=2, dim=20), Run(tp=2, dim=20)):
        results = run_ranks(_resume_train_save, run.shape.world_size, run, str(tmp_path))
        assert saved is None or results[0][0] == saved
        saved = results[0][1]


def _die_while_saving(rank: int, world_size: int, run: Run, root: str, victim: int) -> None:
    trainer = Trainer(run, rank)
    with trainer.checkpointer(Path(root)) as checkpointer:
        trainer.step()
        checkpointer.save(1, trainer.state)
        trainer.step()

        def die(done_bytes: int) -> None:
            if rank == victim:
                os.kill(os.getpid(), signal.SIGKILL)

        checkpointer.save(2, trainer.state, on_bytes=die)


def _load_and_save(rank: int, world_size: int, run: Run, root: str) -> tuple[int, list[int]]:
    trainer = Trainer(run, rank)
    with trainer.checkpointer(Path(root)) as checkpointer:
        step = checkpointer.load(trainer.state)
        checkpointer.save(step, trainer.state)
        return step, checkpointer.steps()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_while_it_saves_costs_only_that_step(tmp_path: Path, victim: int) -> None:
    run = Run(dp_shard=2)
    with pytest.raises(RankError, match=f"rank {victim} of 2 failed: .* exit code -9"):
        run_ranks(_die_while_saving, 2, run, str(tmp_path), victim)
    assert (tmp_path / "step-00000002-g00001").exists()
    assert run_ranks(_load_and_save, 2, run, str(tmp_path)) == [(2, [1, 2])] * 2
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [
        "step-00000001-g00001",
        "step-00000002-g00002",
    ]
