"""Training on a GPU: what the CPU computes, resumed bit for bit; `pytest -m gpu` on a CUDA host."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from everstep.checkpoint.torch_rng import derive_rng, rng_states, set_rng_states
from everstep.trainer.data import MicroBatch
from everstep.trainer.meter import peak_memory_bytes
from everstep.trainer.transfer import CudaTransfer, in_flight
from tests.support import cli

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEADLINE_S = 600.0
ON_GPU = ("parallel.device=cuda", "parallel.deterministic=true")


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    """A directory with ``run.yaml``: one rank, with dropout, evaluation and accumulation."""
    (tmp_path / "run.yaml").write_text(
        """
name: small
seed: 7
train: {steps: 20, eval_every: 10, eval_batches: 2}
model: {dim: 128, layers: 2, heads: 4, kv_heads: 2, dropout: 0.1}
data: {seq_len: 128, global_batch: 8, micro_batch: 2}
mesh: {dp_shard: 1}
optim: {lr: 3e-3, warmup_steps: 5}
checkpoint: {every_steps: 10}
"""
    )
    return tmp_path


def train(folder: Path, name: str, *more: str) -> Path:
    arguments = ("train", "run.yaml", "--run-dir", name, *more)
    with cli.command(*arguments, cwd=folder) as started:
        assert started.wait(DEADLINE_S) == 0, started.output
    return folder / name


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in metrics(run_dir)]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_losses_are_those_of_the_cpu(run_yaml: Path) -> None:
    on_cpu = losses(train(run_yaml, "cpu", "parallel.device=cpu"))
    on_gpu = losses(train(run_yaml, "gpu", *ON_GPU))
    # fp32 on both: differences are of rounding, and grow from step to step
    np.testing.assert_allclose(on_gpu[:5], on_cpu[:5], rtol=1e-5)
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=1e-3)


def test_tf32_stays_close(run_yaml: Path) -> None:
    exact = losses(train(run_yaml, "fp32", *ON_GPU))
    rounded = losses(train(run_yaml, "tf32", *ON_GPU, "parallel.matmul_precision=tf32"))
    np.testing.assert_allclose(rounded, exact, rtol=2e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_the_run_bit_for_bit(run_yaml: Path, precision: str) -> None:
    more = (*ON_GPU, f"parallel.precision={precision}", "optim.schedule=constant")
    straight = train(run_yaml, "straight", *more)
    train(run_yaml, "resumed", *more, "train.steps=10", "data.prefetch=0")
    resumed = train(run_yaml, "resumed", *more, "data.prefetch=4")
    assert losses(resumed) == losses(straight)
    assert cli.final_bytes(resumed) == cli.final_bytes(straight)


def test_generators_of_the_gpu_resume(run_yaml: Path) -> None:
    """torch's own dropout draws on the GPU from what the checkpoint must carry."""
    (run_yaml / "dropout_model.py").write_text(DROPOUT_MODEL)
    more = (*ON_GPU, "model.factory=dropout_model:make", "optim.schedule=constant")
    straight = train(run_yaml, "straight", *more)
    train(run_yaml, "resumed", *more, "train.steps=10")
    resumed = train(run_yaml, "resumed", *more)
    assert losses(resumed) == losses(straight)
    assert cli.final_bytes(resumed) == cli.final_bytes(straight)


@pytest.mark.parametrize("recompute", ["false", "true"])
def test_bf16_and_compiled_blocks_train_alike(run_yaml: Path, recompute: str) -> None:
    exact = losses(train(run_yaml, "fp32", *ON_GPU))
    fast = train(
        run_yaml,
        "fast",
        "parallel.device=cuda",
        "parallel.precision=bf16",
        "parallel.compile=true",
        f"parallel.activation_checkpointing={recompute}",
        "train.sample_tokens=80",
    )
    np.testing.assert_allclose(losses(fast), exact, rtol=3e-2)
    last = metrics(fast)[-1]
    assert 0 < last["peak_memory_bytes"] < torch.cuda.get_device_properties(0).total_memory
    assert last["tflops_per_s"] > 0
    assert 0 < last.get("mfu", 0.5) < 1


def test_a_checkpoint_moves_between_cpu_and_gpu(run_yaml: Path) -> None:
    constant = "optim.schedule=constant"
    train(run_yaml, "moved", constant, "parallel.device=cpu", "train.steps=10")
    moved = losses(train(run_yaml, "moved", constant, *ON_GPU))
    stayed = losses(train(run_yaml, "stayed", constant, "parallel.device=cpu"))
    np.testing.assert_allclose(moved, stayed, rtol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("mesh", [["mesh.dp_shard=2"], ["mesh.dp_shard=1", "mesh.tp=2"]])
def test_two_gpus_compute_what_one_does(run_yaml: Path, mesh: list[str]) -> None:
    alone = losses(train(run_yaml, "one", *ON_GPU, "mesh.dp_shard=1"))
    both = losses(train(run_yaml, "two", *ON_GPU, *mesh))
    np.testing.assert_allclose(both, alone, rtol=1e-4)


def test_batches_arrive_whole_and_in_order() -> None:
    """Copies run on a stream of their own while kernels that use earlier batches are queued."""
    device = torch.device("cuda", 0)
    rng = np.random.default_rng(0)
    originals = [
        MicroBatch(
            rng.integers(0, 1000, (8, 1024)), rng.integers(0, 1000, (8, 1024)), np.array([n])
        )
        for n in range(50)
    ]
    ballast = torch.randn(2048, 2048, device=device)
    sums = []
    for batch in in_flight(originals, CudaTransfer(device)):
        ballast = ballast @ ballast
        ballast /= ballast.norm()
        sums.append(
            torch.stack([batch.tokens_BL.sum(), batch.targets_BL.sum(), batch.sample_B.sum()])
        )
        del batch  # its memory may be used again as soon as the stream is done with it
    expected = [
        [int(b.tokens_BL.sum()), int(b.targets_BL.sum()), int(b.sample_B.sum())] for b in originals
    ]
    assert torch.stack(sums).tolist() == expected


def test_state_of_the_gpus_generator_can_be_set() -> None:
    torch.cuda.init()
    derive_rng(3, 0, "dp0")
    states = {name: state.clone() for name, state in rng_states().items()}
    assert "torch_cuda" in states
    drawn = torch.rand(5, device="cuda")
    set_rng_states(states)
    assert torch.equal(torch.rand(5, device="cuda"), drawn)
    assert not math.isclose(float(torch.rand((), device="cuda")), float(drawn[0]))


def test_peak_memory_is_that_of_the_gpu() -> None:
    device = torch.device("cuda", 0)
    torch.cuda.reset_peak_memory_stats(device)
    before = peak_memory_bytes(device)
    block = torch.empty(2**26, dtype=torch.uint8, device=device)
    assert peak_memory_bytes(device) >= before + block.numel()


DROPOUT_MODEL = """
from torch import nn


def make(vocab_size, seq_len):
    return nn.Sequential(
        nn.Embedding(vocab_size, 64), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(64, vocab_size),
    )
"""
