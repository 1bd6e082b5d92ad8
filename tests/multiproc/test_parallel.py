"""Every layout computes what one rank computes, in training, start-up, loss and sampling."""

from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.distributed.tensor import DTensor, Shard

from everstep.checkpoint.torch_layout import live_tensor
from everstep.trainer.config import ModelConfig, ParallelConfig
from everstep.trainer.errors import ConfigError
from everstep.trainer.init import materialise
from everstep.trainer.loss import IGNORED, token_loss_sum
from everstep.trainer.mesh import build_mesh
from everstep.trainer.mesh_shape import AXES, MeshShape
from everstep.trainer.model import build_model, logits_of
from everstep.trainer.parallelize import parallelize, set_gradient_sync
from everstep.trainer.sample import generate, logits_at
from tests.support.spawn import RankError, run_ranks
from tests.support.training import SEQ_LEN, VOCAB, TinyResult, TinyRun, train_tiny

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(300)]

RECOMPUTE = ParallelConfig(activation_checkpointing=True)
BF16 = ParallelConfig(precision="bf16")
COMPILE = ParallelConfig(compile=True, activation_checkpointing=True)
TIED = TinyRun(tie_embeddings=True)
BIGRAM = TinyRun(factory="tests.support.models:bigram")

LAYOUTS = {
    "dp2": TinyRun(dp_shard=2),
    "dp4": TinyRun(dp_shard=4),
    "replicate2": TinyRun(dp_replicate=2),
    "hsdp2x2": TinyRun(dp_replicate=2, dp_shard=2),
    "tp2": TinyRun(tp=2),
    "dp2_tp2": TinyRun(dp_shard=2, tp=2),
    "recompute": TinyRun(parallel=RECOMPUTE),
    "dp2_accumulate": TinyRun(dp_shard=2, micro_batches=4),
    "replicate2_tp2_recompute_accumulate": TinyRun(
        dp_replicate=2, tp=2, micro_batches=2, parallel=RECOMPUTE
    ),
}


@cache
def _one_rank(run: TinyRun) -> TinyResult:
    (result,) = run_ranks(train_tiny, 1, run)
    assert isinstance(result, TinyResult)
    return result


def _assert_trains_alike(run: TinyRun, reference: TinyRun, rtol: float) -> None:
    expected = _one_rank(reference)
    assert expected.losses[-1] < expected.losses[0] - 0.5
    for result in run_ranks(train_tiny, run.shape.world_size, run):
        np.testing.assert_allclose(result.losses, expected.losses, rtol=rtol)
        np.testing.assert_allclose(result.norms, expected.norms, rtol=5 * rtol)


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_and_norms_are_those_of_one_rank(name: str) -> None:
    _assert_trains_alike(LAYOUTS[name], TinyRun(), rtol=1e-5)


def test_tied_embeddings_stay_tied_on_a_two_dimensional_mesh() -> None:
    _assert_trains_alike(TinyRun(tie_embeddings=True, dp_shard=2, tp=2), TIED, rtol=1e-5)


def test_attention_inside_of_documents_on_a_two_dimensional_mesh() -> None:
    run = TinyRun(document_end=4, dp_shard=2, tp=2, parallel=RECOMPUTE)
    masked = TinyRun(document_end=4)
    _assert_trains_alike(run, masked, rtol=1e-5)
    assert abs(_one_rank(masked).losses[-1] - _one_rank(TinyRun()).losses[-1]) > 1e-3


def test_a_users_model_is_sharded() -> None:
    run = TinyRun(factory=BIGRAM.factory, dp_shard=2, parallel=RECOMPUTE)
    _assert_trains_alike(run, BIGRAM, rtol=1e-5)


@pytest.mark.parametrize("layout", [TinyRun(parallel=BF16), TinyRun(tp=2, parallel=BF16)])
def test_bf16_stays_close_to_fp32(layout: TinyRun) -> None:
    _assert_trains_alike(layout, TinyRun(), rtol=5e-3)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("sizes", [{"dp_shard": 2}, {"tp": 2}])
def test_compiled_blocks_train_alike(sizes: dict[str, int]) -> None:
    run = TinyRun(parallel=COMPILE, **sizes)
    expected = _one_rank(TinyRun())
    for result in run_ranks(train_tiny, 2, run, timeout_s=280):
        np.testing.assert_allclose(result.losses, expected.losses, rtol=1e-5)


def _graphs_of_ten_blocks(rank: int, world_size: int) -> dict[str, int]:
    """How many graphs training, evaluation and sampling compile."""
    from torch._dynamo.utils import counters

    config = ModelConfig(dim=32, layers=10, heads=4, kv_heads=2, dropout=0.1)
    shape = MeshShape()
    parallel = ParallelConfig(compile=True, activation_checkpointing=True, precision="bf16")
    model = build_model(config, vocab_size=VOCAB, seq_len=SEQ_LEN, seed=3)
    parallelize(model, build_mesh(shape, "cpu"), shape, parallel)
    materialise(model, torch.device("cpu"), seed=3)
    tokens_BL = torch.arange(2 * SEQ_LEN).reshape(2, SEQ_LEN)
    sample_B = torch.arange(2)
    found = {}
    for last in (False, True, False, True):
        set_gradient_sync(model, last)
        loss = token_loss_sum(logits_of(model, tokens_BL, sample_B), tokens_BL)
        torch.autograd.backward(loss)
    found["training"] = counters["stats"]["unique_graphs"]
    model.eval()
    with torch.no_grad():
        for _ in range(2):
            logits_of(model, tokens_BL, sample_B)
    found["evaluation"] = counters["stats"]["unique_graphs"]
    with torch.compiler.set_stance("force_eager"):
        generate(logits_at(model), [1], 9, temperature=0.0, seed=0, seq_len=SEQ_LEN)
    found["sampling"] = counters["stats"]["unique_graphs"]
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_all_blocks_are_one_graph_per_mode() -> None:
    (found,) = run_ranks(_graphs_of_ten_blocks, 1, timeout_s=280)
    assert found == {"training": 1, "evaluation": 2, "sampling": 2}


def _initial_parts(
    rank: int, world_size: int, shape: MeshShape
) -> dict[str, tuple[tuple[slice, ...], NDArray[np.float32]]]:
    """Place and values of this rank's part of every parameter."""
    run = TinyRun(tie_embeddings=False)
    mesh = build_mesh(shape, "cpu")
    coordinate = shape.coordinate(rank)
    assert mesh.get_coordinate() == tuple(coordinate[axis] for axis in AXES)
    model = build_model(run.model, vocab_size=VOCAB, seq_len=SEQ_LEN, seed=3)
    materialise(parallelize(model, mesh, shape, run.parallel), torch.device("cpu"), seed=3)
    parts = {}
    for name, parameter in model.named_parameters():
        live = live_tensor(name, parameter)
        box = live.fragment.box
        place = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
        parts[name] = (place, live.local.numpy().copy())
        if isinstance(parameter, DTensor):
            assert torch.equal(parameter.full_tensor()[place], live.local)
    return parts


@pytest.mark.parametrize(
    "shape",
    [
        MeshShape(dp_shard=3),
        MeshShape(dp_shard=3, tp=2),
        pytest.param(MeshShape(dp_replicate=2, dp_shard=2, tp=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_initial_weights_are_the_same_on_layouts_that_do_not_divide(shape: MeshShape) -> None:
    whole = run_ranks(_initial_parts, 1, MeshShape())[0]
    ranks = run_ranks(_initial_parts, shape.world_size, shape)
    for name, (_, expected) in whole.items():
        covered = np.zeros(expected.shape, dtype=int)
        for parts in ranks:
            box, values = parts[name]
            np.testing.assert_array_equal(values, expected[box])
            covered[box] += 1
        assert covered.min() == covered.max() >= 1


def _loss_and_gradient(
    rank: int, world_size: int, logits_BLV: NDArray[np.float32], targets_BL: NDArray[np.int64]
) -> tuple[float, NDArray[np.float32]]:
    logits = torch.from_numpy(logits_BLV).requires_grad_()
    seen = logits
    if world_size > 1:
        mesh = build_mesh(MeshShape(tp=world_size), "cpu")["tp"]
        own = logits.chunk(world_size, dim=2)[rank]
        seen = DTensor.from_local(own, mesh, [Shard(2)], run_check=False)
    loss = token_loss_sum(seen, torch.from_numpy(targets_BL))
    (loss * 3).backward()
    assert logits.grad is not None
    return loss.item(), logits.grad.numpy()


def test_loss_of_a_vocabulary_cut_in_two() -> None:
    random = np.random.default_rng(0)
    logits_BLV = random.normal(size=(2, 5, 12)).astype(np.float32) * 30
    targets_BL = random.integers(0, 12, (2, 5))
    targets_BL[1, 2] = IGNORED
    ((loss, gradient),) = run_ranks(_loss_and_gradient, 1, logits_BLV, targets_BL)
    ranks = run_ranks(_loss_and_gradient, 2, logits_BLV, targets_BL)
    np.testing.assert_allclose([part for part, _ in ranks], [loss, loss], rtol=1e-6)
    np.testing.assert_allclose(sum(part for _, part in ranks), gradient, rtol=1e-5, atol=1e-6)


def _generate(rank: int, world_size: int, shape: MeshShape) -> list[int]:
    run = TinyRun()
    model = build_model(run.model, vocab_size=VOCAB, seq_len=SEQ_LEN, seed=3)
    mesh = build_mesh(shape, "cpu")
    materialise(parallelize(model, mesh, shape, run.parallel), torch.device("cpu"), seed=3)
    return generate(logits_at(model), [1, 2, 3], 20, 0.8, 5, SEQ_LEN, VOCAB, tp=shape.tp)


def test_every_rank_of_every_layout_writes_the_same_text() -> None:
    (expected,) = run_ranks(_generate, 1, MeshShape())
    assert len(expected) == 23
    assert run_ranks(_generate, 4, MeshShape(dp_shard=2, tp=2)) == [expected] * 4


def test_tensor_parallelism_says_what_does_not_divide() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(train_tiny, 4, TinyRun(tp=4, steps=1))
    assert isinstance(caught.value.error, ConfigError)
    assert "model.kv_heads=2 is not a multiple of mesh.tp=4" in str(caught.value.error)
    with pytest.raises(RankError, match=r"needs the built-in model, but model\.factory is set"):
        run_ranks(train_tiny, 2, TinyRun(tp=2, steps=1, factory=BIGRAM.factory))
