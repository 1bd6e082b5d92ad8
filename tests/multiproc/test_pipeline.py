"""Every pipeline computes what one rank computes: losses, norms, evaluation and text."""

import numpy as np
import pytest

from everstep.trainer.errors import ConfigError
from everstep.trainer.mesh import build_mesh
from everstep.trainer.model import build_model
from everstep.trainer.parallelize import parallelize
from tests.support.pipelines import PipelineResult, PipelineRun, train_pipeline
from tests.support.spawn import RankError, run_ranks
from tests.support.training import TinyRun

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(300)]

INTERLEAVED = {"pipeline_schedule": "interleaved"}
ZERO_BUBBLE = {"pipeline_schedule": "zero_bubble"}
RECOMPUTE = {"activation_checkpointing": True}
BF16 = {"precision": "bf16"}

COVERING = {
    "tied": PipelineRun(pp=2, tie=True),
    "four stages, one sample at a time": PipelineRun(pp=4, micro_batch=1),
    "interleaved, recomputed, inside of documents": PipelineRun(
        pp=2, document_mask=True, parallel=INTERLEAVED | RECOMPUTE
    ),
    "zero bubble, recomputed, tied": PipelineRun(pp=2, tie=True, parallel=ZERO_BUBBLE | RECOMPUTE),
    "pp2 x tp2, zero bubble": PipelineRun(pp=2, tp=2, steps=8, parallel=ZERO_BUBBLE),
    "pp2 x dp2 x tp2, interleaved, tied": PipelineRun(
        pp=2, dp_shard=2, tp=2, steps=4, tie=True, parallel=INTERLEAVED
    ),
}
SLOW = {"four stages, one sample at a time", "pp2 x tp2, zero bubble"}
ALL = {
    f"pp{pp} x {replicate} x {shard} x tp{tp}, {schedule}": PipelineRun(
        pp=pp,
        dp_replicate=replicate,
        dp_shard=shard,
        tp=tp,
        layers=2 * pp,
        kv_heads=4,
        parallel={"pipeline_schedule": schedule},
    )
    for pp in (2, 4, 8)
    for replicate in (1, 2, 4)
    for shard in (1, 2, 4)
    for tp in (1, 2, 4)
    if pp * replicate * shard * tp <= 8
    for schedule in ("1f1b", "interleaved", "zero_bubble")
}
UNEVEN = {
    "pp2 x dp3": PipelineRun(pp=2, dp_shard=3, global_batch=24, tie=True, parallel=ZERO_BUBBLE),
    "five layers on four stages": PipelineRun(pp=2, layers=5, parallel=INTERLEAVED),
    "three micro-batches": PipelineRun(pp=2, global_batch=3, micro_batch=1, parallel=ZERO_BUBBLE),
    "four stages per rank": PipelineRun(
        pp=2, dp_shard=2, layers=8, parallel=INTERLEAVED | {"stages_per_rank": 4}
    ),
}
_references: dict[str, PipelineResult] = {}


def _one_rank(run: PipelineRun) -> PipelineResult:
    reference = run.on_one_rank
    key = repr(reference)
    if key not in _references:
        (_references[key],) = run_ranks(train_pipeline, 1, reference)
    return _references[key]


def _results(run: PipelineRun) -> PipelineResult:
    results = run_ranks(train_pipeline, run.shape.world_size, run, timeout_s=280)
    assert all(result == results[0] for result in results)
    found: PipelineResult = results[0]
    return found


def _assert_trains_alike(run: PipelineRun, rtol: float = 1e-5) -> None:
    expected, found = _one_rank(run), _results(run)
    assert len(found.losses) == run.steps
    assert run.steps < 20 or expected.losses[-1] < expected.losses[0] - 0.5
    np.testing.assert_allclose(found.losses, expected.losses, rtol=rtol)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=5 * rtol)
    np.testing.assert_allclose(found.eval_loss, expected.eval_loss, rtol=rtol)
    assert min(expected.norms) > 0.5, "clipping has to have work"
    assert found.parameters == expected.parameters
    if rtol <= 1e-5:
        assert found.text == expected.text


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in COVERING],
)
def test_losses_norms_and_text_are_those_of_one_rank(name: str) -> None:
    _assert_trains_alike(COVERING[name])


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", ALL)
def test_every_layout_on_eight_ranks(name: str) -> None:
    _assert_trains_alike(ALL[name])


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", UNEVEN)
def test_what_does_not_divide_evenly(name: str) -> None:
    _assert_trains_alike(UNEVEN[name])


def test_bf16_stays_close_to_fp32() -> None:
    _assert_trains_alike(PipelineRun(pp=2, tie=True, parallel=BF16 | INTERLEAVED), rtol=5e-3)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_bf16_on_eight_ranks(schedule: str) -> None:
    parallel = BF16 | RECOMPUTE | {"pipeline_schedule": schedule}
    run = PipelineRun(pp=2, dp_shard=2, tp=2, tie=True, parallel=parallel)
    _assert_trains_alike(run, rtol=5e-3)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_compiled_blocks_train_alike() -> None:
    parallel = {"compile": True} | RECOMPUTE | INTERLEAVED
    _assert_trains_alike(PipelineRun(pp=2, steps=4, parallel=parallel))


def _parallelize_a_users_model(rank: int, world_size: int) -> None:
    run, shape = TinyRun(factory="tests.support.models:bigram"), PipelineRun(pp=2).shape
    model = build_model(run.model, vocab_size=20, seq_len=8, seed=0)
    parallelize(model, build_mesh(shape, "cpu"), shape, run.parallel)


def test_a_users_model_has_no_stages() -> None:
    with pytest.raises(RankError, match=r"mesh\.pp=2 needs the built-in model") as caught:
        run_ranks(_parallelize_a_users_model, 2)
    assert isinstance(caught.value.error, ConfigError)
