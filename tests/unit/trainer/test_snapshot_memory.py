"""What snapshots take, by the config; compared with real ones in tests/e2e/test_snapshots.py."""

import pytest

from everstep.trainer.config_load import load_config
from everstep.trainer.mesh_shape import resolve_mesh
from everstep.trainer.model_shape import ModelShape, resolve_model
from everstep.trainer.snapshot_memory import (
    SAVED_BYTES_PER_PARAMETER,
    SnapshotMemory,
    snapshot_budget,
    snapshot_memory,
)

MIB = 2**20
RANK = 2**17


def estimate(
    *overrides: str, world_size: int = 1, ranks: int | None = None
) -> tuple[ModelShape, SnapshotMemory]:
    config = load_config("llama_125m", overrides)
    model = resolve_model(config.model, 50_000)
    shape = resolve_mesh(config.mesh, world_size)
    found = snapshot_memory(config, model, shape, ranks or world_size)
    assert found is not None
    return model, found


def test_one_rank_holds_the_state_as_often_as_there_are_slots() -> None:
    model, memory = estimate()
    assert memory.snapshot_bytes == SAVED_BYTES_PER_PARAMETER * model.parameters + RANK
    assert (memory.slots, memory.node_bytes) == (3, 3 * memory.snapshot_bytes)


@pytest.mark.parametrize(
    ("overrides", "slots"),
    [
        (["checkpoint.every_steps=0"], 2),
        (["checkpoint.every_steps=0", "checkpoint.every_s=60"], 3),
        (["checkpoint.every_steps=7"], 3),
    ],
)
def test_a_snapshot_that_is_being_flushed_takes_a_slot(overrides: list[str], slots: int) -> None:
    assert estimate(*overrides)[1].slots == slots


@pytest.mark.parametrize("mesh", [["mesh.dp_replicate=2"], ["mesh.tp=2"], []])
def test_replicas_share_what_they_have_in_common(mesh: list[str]) -> None:
    model, memory = estimate(*mesh, world_size=4)
    assert memory.snapshot_bytes == SAVED_BYTES_PER_PARAMETER * model.parameters + 4 * RANK
    assert memory.rank_bytes == SAVED_BYTES_PER_PARAMETER * model.parameters // 4 + RANK


def test_a_node_of_several_holds_the_part_of_its_ranks() -> None:
    _, whole = estimate(world_size=4)
    _, half = estimate(world_size=4, ranks=2)
    assert half.snapshot_bytes == whole.snapshot_bytes // 2


@pytest.mark.parametrize("tied", ["true", "false"])
def test_the_largest_stage_of_a_pipeline_counts(tied: str) -> None:
    model, memory = estimate(f"model.tie_embeddings={tied}", "mesh.pp=2", world_size=2)
    embedding = model.vocab_size * model.dim
    assert memory.rank_bytes > SAVED_BYTES_PER_PARAMETER * embedding
    assert memory.rank_bytes < SAVED_BYTES_PER_PARAMETER * model.parameters
    assert memory.snapshot_bytes <= SAVED_BYTES_PER_PARAMETER * model.parameters + 2 * RANK


def test_without_snapshots_there_is_nothing_to_hold() -> None:
    config = load_config("llama_125m", ["checkpoint.memory=null"])
    model = resolve_model(config.model, 50_000)
    assert snapshot_memory(config, model, resolve_mesh(config.mesh, 1), 1) is None


def test_a_budget_is_as_configured_or_most_of_what_is_there() -> None:
    config = load_config("demo")
    assert snapshot_budget(config.checkpoint, 1000 * MIB) == 800 * MIB
    config = load_config("demo", [f"checkpoint.memory_budget_bytes={5 * MIB}"])
    assert snapshot_budget(config.checkpoint, 1000 * MIB) == 5 * MIB
