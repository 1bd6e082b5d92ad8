"""Every config that is shipped: it loads, fits its natural number of ranks, and keeps its word."""

import re

import pytest

from everstep.trainer.config import RunConfig
from everstep.trainer.config_load import load_config, packaged_configs, parse_config
from everstep.trainer.mesh_shape import (
    BYTES_VOCAB,
    check_config,
    plan_batches,
    resolve_mesh,
    world_size_of,
)
from everstep.trainer.model_shape import resolve_model

GPUS_PER_HOST = 8
RANKS = {
    "debug_accum": 2,
    "debug_dp2": 2,
    "debug_dp2_tp2": 4,
    "debug_dp4": 4,
    "debug_hsdp2x2": 4,
    "debug_pp2": 2,
    "debug_pp2_dp2_tp2": 8,
    "debug_replicate2": 2,
    "debug_single": 1,
    "debug_tp2": 2,
    "demo": 4,
    "llama_125m": 8,
    "llama_1b": 8,
    "llama_8b": 8,
}
UNITS = {"k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def text_of(name: str) -> str:
    return packaged_configs()[name].read_text(encoding="utf-8")


def parameters(config: RunConfig) -> int:
    return resolve_model(config.model, BYTES_VOCAB).parameters


def test_all_of_them_are_listed_here() -> None:
    assert set(packaged_configs()) == set(RANKS)


@pytest.mark.parametrize("name", RANKS)
def test_config_fits_its_ranks(name: str) -> None:
    config = load_config(name)
    assert config.name == name
    world_size = world_size_of(config.mesh, None, GPUS_PER_HOST)
    assert world_size == RANKS[name]
    shape = resolve_mesh(config.mesh, world_size)
    check_config(config, shape)


@pytest.mark.parametrize("name", RANKS)
def test_first_line_describes_it_in_one_short_line(name: str) -> None:
    first = text_of(name).splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith(".")
    assert len(first) <= 84  # with the name it fits 100 columns in `everstep config list`


@pytest.mark.parametrize("name", RANKS)
def test_stated_parameters_are_right(name: str) -> None:
    stated = re.search(r"([\d.]+)([kMB]) parameters", text_of(name))
    assert stated is not None
    assert parameters(load_config(name)) == pytest.approx(
        float(stated[1]) * UNITS[stated[2]], rel=0.005
    )


@pytest.mark.parametrize("name", [name for name in RANKS if name.startswith("llama")])
def test_stated_tokens_and_batches_are_right(name: str) -> None:
    text, config = text_of(name), load_config(name)
    per_step = config.data.global_batch * config.data.seq_len
    stated = re.search(r"# ([\d,]+) steps of ([\d.]+)M tokens: ([\d.]+)([BT]) tokens", text)
    assert stated is not None
    assert int(stated[1].replace(",", "")) == config.train.steps
    assert per_step == pytest.approx(float(stated[2]) * 10**6, rel=0.05)
    total = float(stated[3]) * UNITS[stated[4]]
    assert per_step * config.train.steps == pytest.approx(total, rel=0.05)
    batches = re.search(r"(\d+) samples? per forward pass, (\d+) per\s+#?\s*update", text)
    assert batches is not None
    plan = plan_batches(config.data, GPUS_PER_HOST)
    assert (plan.micro_batch, plan.accumulation) == (int(batches[1]), int(batches[2]))


def test_demo_is_small_and_two_dimensional() -> None:
    config = load_config("demo")
    assert 3_000_000 <= parameters(config) <= 6_000_000
    shape = resolve_mesh(config.mesh, 4)
    assert (shape.dp_shard, shape.tp) == (2, 2)


def test_debug_configs_differ_in_layout_only() -> None:
    reference = load_config("debug_single")
    for name in RANKS:
        if name.startswith("debug_"):
            config = load_config(name)
            data = config.data.model_copy(update={"micro_batch": reference.data.micro_batch})
            same = {"name": reference.name, "mesh": reference.mesh, "data": data}
            assert config.model_copy(update=same) == reference
    assert reference.model.dropout > 0


def test_comments_are_kept_out_of_values() -> None:
    for name in packaged_configs():
        assert parse_config(text_of(name), name) == load_config(name)
