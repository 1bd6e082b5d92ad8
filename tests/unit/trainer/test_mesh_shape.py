"""Mesh shapes, batch plans and checks across sections."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.trainer.config import DataConfig, MeshConfig, RunConfig
from everstep.trainer.errors import ConfigError
from everstep.trainer.mesh_shape import (
    AXES,
    MeshShape,
    check_config,
    local_device,
    plan_batches,
    resolve_mesh,
    settle_micro_batch,
    world_size_of,
)

sizes = st.integers(1, 5)


@settings(deadline=None, max_examples=50)
@given(replicate=sizes, shard=sizes, tp=sizes)
def test_auto_takes_what_is_left(replicate: int, shard: int, tp: int) -> None:
    world_size = replicate * shard * tp
    asked = MeshConfig(dp_replicate=replicate, tp=tp)
    shape = resolve_mesh(asked, world_size)
    assert shape == MeshShape(dp_replicate=replicate, dp_shard=shard, tp=tp)
    assert shape == resolve_mesh(asked.model_copy(update={"dp_shard": shard}), world_size)
    assert shape.world_size == world_size
    assert shape.dp == replicate * shard


@settings(deadline=None, max_examples=50)
@given(pp=sizes, replicate=sizes, shard=sizes, tp=sizes)
def test_coordinates_are_row_major_and_distinct(
    pp: int, replicate: int, shard: int, tp: int
) -> None:
    shape = MeshShape(pp=pp, dp_replicate=replicate, dp_shard=shard, tp=tp)
    seen = []
    for rank in range(shape.world_size):
        coordinate = shape.coordinate(rank)
        assert tuple(coordinate) == AXES
        index = 0
        for axis, size in zip(AXES, shape.sizes, strict=True):
            index = index * size + coordinate[axis]
        assert index == rank
        seen.append(tuple(coordinate.values()))
    assert len(set(seen)) == math.prod(shape.sizes)


def test_tp_neighbours_are_consecutive_ranks() -> None:
    shape = MeshShape(dp_shard=2, tp=2)
    assert [shape.coordinate(rank)["tp"] for rank in range(4)] == [0, 1, 0, 1]
    assert [shape.coordinate(rank)["dp_shard"] for rank in range(4)] == [0, 0, 1, 1]


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_outside_of_the_mesh(rank: int) -> None:
    with pytest.raises(ConfigError, match=rf"rank {rank} is outside of mesh dp_shard 2 x tp 2"):
        MeshShape(dp_shard=2, tp=2).coordinate(rank)


def test_shapes_in_words() -> None:
    assert str(MeshShape(dp_replicate=2, dp_shard=4)) == "mesh dp_replicate 2 x dp_shard 4"
    assert str(MeshShape()) == "a single rank"


@pytest.mark.parametrize(
    ("mesh", "world_size", "message"),
    [
        (
            {"dp_shard": 2, "tp": 2},
            3,
            "the mesh (dp_shard 2 x tp 2) needs 4 ranks, but there are 3: start 4 (--nproc 4) or "
            "change the mesh",
        ),
        (
            {"dp_shard": 2, "tp": 2},
            8,
            "needs 4 ranks, but there are 8: start 4 (--nproc 4) or set mesh.dp_shard=4 or auto",
        ),
        ({"dp_shard": 1}, 2, "the mesh (one rank) needs 1 rank, but there are 2: start 1"),
        (
            {"dp_replicate": 2, "tp": 2},
            6,
            "the mesh (dp_replicate 2 x dp_shard auto x tp 2) needs a multiple of 4 ranks, but "
            "there are 6: start 4 (--nproc 4) or change mesh.pp, mesh.dp_replicate and mesh.tp",
        ),
        ({"tp": 4}, 1, "needs a multiple of 4 ranks, but there is only 1: start 4"),
        ({"cp": 2}, 2, "mesh.cp=2: context parallelism is not built yet"),
        ({"ep": 3}, 3, "mesh.ep=3: expert parallelism is not built yet"),
    ],
)
def test_a_mesh_that_does_not_fit(mesh: dict[str, object], world_size: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_mesh(MeshConfig.model_validate(mesh), world_size)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("mesh", "nproc", "gpus", "world_size"),
    [
        ({"dp_shard": 2, "tp": 2}, None, 0, 4),
        ({"dp_shard": 2, "tp": 2}, None, 8, 4),
        ({"dp_shard": 2}, 3, 8, 3),
        ({}, None, 0, 1),
        ({}, None, 8, 8),
        ({"tp": 2}, None, 0, 2),
        ({"tp": 2}, None, 7, 6),
        ({"dp_replicate": 2, "tp": 4}, None, 4, 8),
    ],
)
def test_ranks_of_the_local_launcher(
    mesh: dict[str, object], nproc: int | None, gpus: int, world_size: int
) -> None:
    assert world_size_of(MeshConfig.model_validate(mesh), nproc, gpus) == world_size


@pytest.mark.parametrize(
    ("device", "gpus", "world_size", "chosen"),
    [
        ("auto", 0, 1, "cpu"),
        ("auto", 4, 4, "cuda"),
        ("auto", 1, 4, "cpu"),
        ("cpu", 8, 1, "cpu"),
        ("cuda", 8, 8, "cuda"),
    ],
)
def test_device_of_local_ranks(device: str, gpus: int, world_size: int, chosen: str) -> None:
    assert local_device(device, gpus, world_size) == chosen


def test_too_few_gpus_are_an_error_when_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"with 2 ranks needs a GPU for each, .* has 1: "):
        local_device("cuda", 1, 2)


@settings(deadline=None, max_examples=50)
@given(dp=sizes, micro_batch=sizes, accumulation=sizes)
def test_batch_plans(dp: int, micro_batch: int, accumulation: int) -> None:
    per_rank = micro_batch * accumulation
    data = DataConfig(global_batch=dp * per_rank, micro_batch=micro_batch)
    plan = plan_batches(data, dp)
    assert (plan.per_rank, plan.micro_batch) == (per_rank, micro_batch)
    assert plan.accumulation == accumulation
    whole = plan_batches(data.model_copy(update={"micro_batch": "auto"}), dp)
    assert (whole.micro_batch, whole.accumulation) == (per_rank, 1)


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "dp", "message"),
    [
        (10, "auto", 4, "data.global_batch=10 cannot be divided over 4 .* such as 12$"),
        (16, 3, 2, "data.micro_batch=3 does not divide the 8 samples .* such as 2, or auto$"),
        (4, 8, 2, "data.micro_batch=8 does not divide the 2 samples .* such as 2, or auto$"),
    ],
)
def test_batches_that_cannot_be_divided(
    global_batch: int, micro_batch: int | str, dp: int, message: str
) -> None:
    data = DataConfig.model_validate({"global_batch": global_batch, "micro_batch": micro_batch})
    with pytest.raises(ConfigError, match=message):
        plan_batches(data, dp)


def check(shape: MeshShape, **sections: dict[str, object]) -> None:
    train = {"steps": 10, **sections.pop("train", {})}
    check_config(RunConfig.model_validate({"train": train, **sections}), shape)


@pytest.mark.parametrize(
    ("tp", "sections", "message"),
    [
        (2, {"data": {"seq_len": 255}}, "data.seq_len=255 cannot be divided over mesh.tp=2 ranks"),
        (4, {"model": {"heads": 2}}, "model.heads=2 cannot be divided over mesh.tp=4"),
        (4, {"model": {"kv_heads": 2}}, "model.kv_heads=2 cannot be divided over mesh.tp=4"),
        (4, {"model": {"ffn_dim": 6}}, "model.ffn_dim=6 cannot be divided over mesh.tp=4"),
        (2, {"model": {"vocab_size": 301}}, "model.vocab_size=301 cannot be divided"),
        (
            1,
            {"model": {"factory": "a:b"}, "data": {"document_mask": True}},
            "data.document_mask=true works with the built-in model only",
        ),
        (2, {"model": {"factory": "a:b"}}, "mesh.tp=2 works with the built-in model only"),
        (1, {"model": {"vocab_size": 200}}, "model.vocab_size=200 is smaller than the 257 tokens"),
        (1, {"model": {"factory_args": {"a": 1}}}, "model.factory_args is given without"),
        (1, {"model": {"factory": "a.b.c"}}, "model.factory: got 'a.b.c', expected 'pkg.module:"),
        (1, {"metrics": {"sinks": ["tensorbord"]}}, "did you mean 'tensorboard'?"),
        (1, {"metrics": {"sinks": ["jsonl", "x y"]}}, "metrics.sinks: got 'x y', expected 'jsonl'"),
        (1, {"train": {"eval_every": 5, "eval_batches": 0}}, "train.eval_batches=0 allows none"),
        (1, {"train": {"eval_every": 5}, "data": {"held_out": 0}}, "data.held_out=0 keeps no text"),
        (1, {"data": {"global_batch": 7, "micro_batch": 2}}, "data.micro_batch=2 does not divide"),
    ],
)
def test_sections_that_do_not_agree(
    tp: int, sections: dict[str, dict[str, object]], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check(MeshShape(tp=tp), **sections)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("pp", "sections", "message"),
    [
        (2, {"model": {"factory": "a:b"}}, "mesh.pp=2 works with the built-in model only"),
        (2, {"model": {"layers": 1}}, "model.layers=1 cannot be divided over 2 pipeline stages"),
        (
            2,
            {"model": {"layers": 3}, "parallel": {"pipeline_schedule": "zero_bubble"}},
            "model.layers=3 cannot be divided over 4 pipeline stages (mesh.pp=2 x 2 per rank)",
        ),
        (
            2,
            {"parallel": {"stages_per_rank": 2}},
            "parallel.stages_per_rank=2 needs a schedule that interleaves stages",
        ),
        (
            2,
            {"parallel": {"pipeline_schedule": "zero_bubble", "compile": True}},
            "parallel.pipeline_schedule=zero_bubble computes the gradients of weights apart",
        ),
        (4, {"data": {"global_batch": 3}}, "mesh.pp=4 needs at least 4 micro-batches per step"),
        (
            4,
            {"data": {"micro_batch": 8}},
            "mesh.pp=4 needs at least 4 micro-batches per step, but data.micro_batch makes 2",
        ),
        (
            2,
            {
                "data": {"global_batch": 5, "micro_batch": 1},
                "parallel": {"pipeline_schedule": "interleaved"},
            },
            "parallel.pipeline_schedule=interleaved runs micro-batches in rounds of mesh.pp=2",
        ),
    ],
)
def test_pipelines_that_cannot_be_built(
    pp: int, sections: dict[str, dict[str, object]], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check(MeshShape(pp=pp), **sections)
    assert message in str(caught.value)


def test_micro_batches_are_settled_in_pipelines_only() -> None:
    config = RunConfig.model_validate({"train": {"steps": 1}, "data": {"global_batch": 32}})
    assert settle_micro_batch(config, MeshShape(dp_shard=2)) is config
    settled = settle_micro_batch(config, MeshShape(pp=2, dp_shard=2))
    assert settled.data.micro_batch == 4
    assert settle_micro_batch(settled, MeshShape(pp=4)) is settled


def test_sections_that_agree() -> None:
    check(MeshShape(dp_shard=2, tp=2))
    check(MeshShape(tp=2), data={"tokenizer": "some/tokenizer.json"}, model={"vocab_size": 128})
    check(MeshShape(), model={"factory": "pkg.mod:Class.build", "factory_args": {"a": 1}})
    check(MeshShape(), model={"layers": 1}, parallel={"pipeline_schedule": "zero_bubble"})
    check(MeshShape(pp=4, dp_shard=2, tp=2), parallel={"compile": True})
    check(MeshShape(), metrics={"sinks": ["tensorboard", "pkg.mod:sink"]})
