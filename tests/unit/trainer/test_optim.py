"""Learning-rate schedule, parameter groups and clipping on one rank."""

import math

import pytest
import torch
from torch import nn

from everstep.trainer.config import OptimConfig
from everstep.trainer.optim import build_optimizer, build_scheduler, clip_gradients, lr_factor


def _factors(optim: OptimConfig, total: int) -> list[float]:
    return [lr_factor(step, optim, total) for step in range(total)]


def test_warm_up_rises_linearly_and_its_last_update_has_the_peak() -> None:
    optim = OptimConfig(warmup_steps=4, schedule="constant")
    assert _factors(optim, 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_falls_from_warm_up_to_the_last_update() -> None:
    factors = _factors(OptimConfig(warmup_steps=10, min_lr_ratio=0.1), 110)
    assert factors[9] == 1.0
    assert factors[59] == pytest.approx(0.55)
    assert factors[109] == pytest.approx(0.1)
    assert factors[9:] == sorted(factors[9:], reverse=True)


def test_cosine_stays_at_the_floor_after_its_decay() -> None:
    factors = _factors(OptimConfig(decay_steps=20, min_lr_ratio=0.2), 50)
    assert factors[19:] == pytest.approx([0.2] * 31)


@pytest.mark.parametrize(("decay_steps", "length"), [("auto", 18), (30, 30), (1000, 90)])
def test_wsd_decays_at_the_end_only(decay_steps: int | str, length: int) -> None:
    optim = OptimConfig(schedule="wsd", warmup_steps=10, decay_steps=decay_steps, min_lr_ratio=0.0)
    factors = _factors(optim, 100)
    assert factors[9 : 100 - length] == [1.0] * (91 - length)
    assert factors[100 - length] == pytest.approx(1 - 1 / length)
    assert factors[99] == pytest.approx(0.0)


def test_scheduler_gives_update_zero_its_factor_and_follows_steps() -> None:
    model = nn.Linear(2, 2)
    optim = OptimConfig(lr=0.5, warmup_steps=2, schedule="constant")
    optimizer = build_optimizer(model, optim)
    scheduler = build_scheduler(optimizer, optim, 10)
    rates = []
    for _ in range(3):
        rates.append(optimizer.param_groups[0]["lr"])
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        scheduler.step()
    assert rates == [0.25, 0.5, 0.5]


def test_only_matrices_decay_and_frozen_parameters_stay_out() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
    model[2].weight.requires_grad_(False)
    groups = build_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert groups[0]["params"] == [model[0].weight]
    assert [parameter.dim() for parameter in groups[1]["params"]] == [1, 1, 1]


@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e6])
def test_clipping_scales_to_the_norm_it_returns(max_norm: float) -> None:
    parameters = [nn.Parameter(torch.zeros(3, 5)), nn.Parameter(torch.zeros(7))]
    frozen = nn.Parameter(torch.zeros(2))
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 10
    before = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    expected = math.sqrt(sum(float(gradient.square().sum()) for gradient in before))
    assert clip_gradients([*parameters, frozen], max_norm) == pytest.approx(expected, rel=1e-6)
    factor = min(1.0, max_norm / expected) if max_norm else 1.0
    for parameter, gradient in zip(parameters, before, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * factor)


def test_without_gradients_the_norm_is_zero() -> None:
    assert clip_gradients([nn.Parameter(torch.zeros(2))], 1.0) == 0.0
