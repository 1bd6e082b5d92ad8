"""Initial weights: reproducible, layout-independent, with the asked spread."""

import math

import pytest
import torch

from everstep.checkpoint.layout import Box
from everstep.trainer import init
from everstep.trainer.config import ModelConfig
from everstep.trainer.init import initial_std, materialise
from everstep.trainer.model import Llama, build_model

CONFIG = ModelConfig(dim=64, layers=2, heads=4, kv_heads=2, init_std=0.05)


def _model(config: ModelConfig = CONFIG, seed: int = 1) -> Llama:
    model = build_model(config, vocab_size=257, seq_len=8, seed=seed)
    materialise(model, torch.device("cpu"), seed)
    assert isinstance(model, Llama)
    return model


def test_same_seed_same_weights_other_seed_others() -> None:
    first, again, other = (dict(_model(seed=seed).named_parameters()) for seed in (1, 1, 2))
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        if weight.dim() == 2:
            assert not torch.equal(weight, other[name])


def test_a_weight_depends_on_its_name_only() -> None:
    small, deep = _model(), _model(CONFIG.model_copy(update={"layers": 3, "tie_embeddings": True}))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(small.get_parameter(name), deep.get_parameter(name))
    name_0 = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(small.get_parameter(name), small.get_parameter(name_0))


def test_spread_of_every_kind_of_weight() -> None:
    for name, weight in _model().named_parameters():
        if "norm" in name:
            assert torch.equal(weight, torch.ones(64))
            continue
        scaled = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.05 / math.sqrt(4) if scaled else 0.05
        assert initial_std(name, CONFIG) == pytest.approx(std)
        assert weight.std().item() == pytest.approx(std, rel=0.06)
        assert abs(weight.mean().item()) < 4 * std / math.sqrt(weight.numel())


@pytest.mark.parametrize("rows", [(0, 40), (3, 17), (16, 16), (39, 40)])
def test_any_part_of_a_matrix_is_cut_from_the_same_whole(
    monkeypatch: pytest.MonkeyPatch, rows: tuple[int, int]
) -> None:
    monkeypatch.setattr(init, "_BLOCK_ELEMENTS", 7 * 24)
    whole, part = torch.empty(40, 24), torch.empty(rows[1] - rows[0], 9)
    init._fill_normal(whole, 24, Box((0, 0), (40, 24)), 0.1, 5, "a")
    box = Box((rows[0], 6), tuple(part.shape))
    init._fill_normal(part, 24, box, 0.1, 5, "a")
    assert torch.equal(part, whole[rows[0] : rows[1], 6:15])
    assert whole.std().item() == pytest.approx(0.1, rel=0.1)


def test_tied_embeddings_stay_one_parameter() -> None:
    model = _model(CONFIG.model_copy(update={"tie_embeddings": True}))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_users_model_keeps_its_weights() -> None:
    model = torch.nn.Linear(2, 2)
    before = model.weight.clone()
    materialise(model, torch.device("cpu"), seed=1)
    assert torch.equal(model.weight, before)
