"""Optimizers of every kind in a checkpoint, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from everstep.checkpoint.errors import (
    StateError,
)
from everstep.checkpoint.layout import TensorSpec
from everstep.checkpoint.torch_optimizer import materialise
from everstep.checkpoint.torch_state import (
    State,
    optimizer_of,
    tensors_of,
)
from tests.support.checkpoints import (
    bits,
    fresh_state,
    save_and_load,
    tiny_state,
    train_step,
)

# Optimizers


def _optimizers() -> dict[str, Callable[[Any], torch.optim.Optimizer]]:
    return {
        "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
        "adamw plain": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False, amsgrad=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
        "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
        "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
        "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
        "adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
        "asgd": lambda p: torch.optim.ASGD(p, lr=0.1),
        "radam": lambda p: torch.optim.RAdam(p, lr=0.1),
        "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
        "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    }


def _with_optimizer(build: Callable[[Any], torch.optim.Optimizer]) -> State:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    model.register_parameter("scale", nn.Parameter(torch.tensor(2.0)))
    model.register_parameter("unused", nn.Parameter(torch.tensor(2.0)))
    decay = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = build([{"params": decay}, {"params": others, "weight_decay": 0.0}])
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3, 4])
    return State(model=model, optimizer=optimizer, scheduler=scheduler)


def _step(state: State) -> None:
    (state.model(torch.randn(4, 3)) * state.model.scale).square().sum().backward()
    assert state.optimizer is not None
    state.optimizer.step()
    state.objects["scheduler"].step()  # type: ignore[attr-defined]
    state.optimizer.zero_grad()


@pytest.mark.parametrize("build", _optimizers().values(), ids=_optimizers())
def test_training_goes_on_exactly(
    tmp_path: Path, build: Callable[[Any], torch.optim.Optimizer]
) -> None:
    saved, loaded = _with_optimizer(build), _with_optimizer(build)
    for _ in range(3):
        _step(saved)
    save_and_load(tmp_path, saved, loaded)
    assert bits(loaded) == bits(saved)
    after_load = torch.get_rng_state()
    for state in (saved, loaded):
        torch.set_rng_state(after_load)
        for _ in range(2):
            _step(state)
    assert bits(loaded) == bits(saved)
    assert saved.optimizer is not None
    assert loaded.optimizer is not None
    for mine, theirs in zip(
        loaded.optimizer.param_groups, saved.optimizer.param_groups, strict=True
    ):
        assert mine["lr"] == theirs["lr"]
        assert type(mine.get("betas")) is type(theirs.get("betas"))


def test_before_the_first_update_there_is_no_state_and_a_load_leaves_none(tmp_path: Path) -> None:
    saved, loaded = fresh_state(), tiny_state()
    save_and_load(tmp_path, saved, loaded)
    assert loaded.optimizer is not None
    assert not loaded.optimizer.state
    assert bits(loaded) == bits(saved)


def test_a_load_into_a_trained_state_replaces_it(tmp_path: Path) -> None:
    saved, loaded = tiny_state(1), tiny_state(2)
    train_step(loaded)
    save_and_load(tmp_path, saved, loaded)
    assert bits(loaded) == bits(saved)


def test_how_updates_are_computed_is_up_to_the_run(tmp_path: Path) -> None:
    saved, loaded = tiny_state(1), tiny_state(2)
    assert loaded.optimizer is not None
    loaded.optimizer.param_groups[0].update(fused=False, foreach=True, lr=0.7)
    save_and_load(tmp_path, saved, loaded)
    group = loaded.optimizer.param_groups[0]
    assert (group["fused"], group["foreach"], group["lr"]) == (False, True, 0.1)
    train_step(loaded)


@pytest.mark.parametrize("fused", [True, False])
def test_state_is_made_where_the_optimizer_wants_it(fused: bool) -> None:
    parameter = nn.Parameter(torch.zeros((), device="meta"))
    optimizer = torch.optim.AdamW([parameter], foreach=not fused)
    optimizer.param_groups[0]["fused"] = fused
    stored = {
        f"optimizer.p.{key}": TensorSpec(f"optimizer.p.{key}", "F32", ())
        for key in ("step", "exp_avg")
    }
    materialise([optimizer], {parameter: "p"}, stored)
    made = optimizer.state[parameter]
    assert made["exp_avg"].device.type == "meta"
    assert made["step"].device.type == ("meta" if fused else "cpu")


def test_an_optimizer_of_another_model_is_refused() -> None:
    odd = torch.optim.SGD(nn.Linear(2, 3).parameters())
    with pytest.raises(StateError, match=r"parameter of shape \(3, 2\) that is not in the model"):
        tensors_of(State(model=nn.Linear(2, 3), optimizer=odd))


@pytest.mark.parametrize(("key", "says"), [("a.b", "'a.b'"), (3, "key 3")])
def test_state_keys_that_are_no_names(key: object, says: str) -> None:
    state = tiny_state()
    assert state.optimizer is not None
    next(iter(state.optimizer.state.values()))[key] = 1
    with pytest.raises(StateError, match=says):
        tensors_of(state)


def test_state_of_no_parameter_is_refused() -> None:
    state = tiny_state()
    assert state.optimizer is not None
    state.optimizer.state["global"]["count"] = 1  # type: ignore[index]
    with pytest.raises(StateError, match="'global', which is no parameter"):
        optimizer_of(state)


def test_a_tensor_among_the_plain_values_is_named() -> None:
    state = tiny_state()
    state.optimizers[0].param_groups[0]["lr"] = torch.tensor([0.1, 0.2])
    with pytest.raises(StateError, match=r"optimizer\.groups\[0\]\.lr is a Tensor"):
        optimizer_of(state)


def test_a_learning_rate_that_is_a_tensor_stays_the_same_tensor(tmp_path: Path) -> None:
    saved, loaded, plain = tiny_state(1), tiny_state(2), tiny_state(3)
    lr = torch.tensor(0.7)
    saved.optimizers[0].param_groups[0]["lr"] = torch.tensor(1 / 3)
    loaded.optimizers[0].param_groups[0]["lr"] = lr
    save_and_load(tmp_path / "tensor", saved, loaded)
    assert loaded.optimizers[0].param_groups[0]["lr"] is lr
    assert torch.equal(lr, torch.tensor(1 / 3))
    save_and_load(tmp_path / "number", loaded, plain)
    assert plain.optimizers[0].param_groups[0]["lr"] == lr.item()


def _two_optimizers(form: Callable[[Any, Any], Any]) -> State:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    first = torch.optim.AdamW(model[0].parameters(), lr=0.1)
    second = torch.optim.SGD(model[1].parameters(), lr=0.2, momentum=0.9)
    return State(model=model, optimizer=form(first, second))


@pytest.mark.parametrize(
    "form", [lambda a, b: [a, b], lambda a, b: {"a": a, "b": b}], ids=["sequence", "mapping"]
)
def test_several_optimizers(tmp_path: Path, form: Callable[[Any, Any], Any]) -> None:
    saved, loaded = _two_optimizers(form), _two_optimizers(lambda a, b: (a, b))
    saved.model(torch.randn(4, 3)).square().sum().backward()
    for optimizer in saved.optimizers:
        optimizer.step()
    saved.optimizers[1].param_groups[0]["lr"] = 0.3
    save_and_load(tmp_path, saved, loaded)
    found, expected = tensors_of(loaded), tensors_of(saved)
    assert found.keys() == expected.keys()
    assert {"optimizer.0.weight.exp_avg", "optimizer.1.bias.momentum_buffer"} <= found.keys()
    assert all(torch.equal(found[n].local, expected[n].local) for n in found)
    assert loaded.optimizers[1].param_groups[0]["lr"] == 0.3


def test_optimizers_over_the_same_parameter_are_refused() -> None:
    model = nn.Linear(2, 2)
    both = [torch.optim.SGD(model.parameters()), torch.optim.SGD([model.bias])]
    with pytest.raises(StateError, match="two optimizers hold the parameter 'bias'"):
        optimizer_of(State(model=model, optimizer=both))


def test_an_optimizer_with_one_history_for_all_parameters_is_refused() -> None:
    model = nn.Linear(2, 2)
    state = State(model=model, optimizer=torch.optim.LBFGS(model.parameters()))
    with pytest.raises(StateError, match="LBFGS keeps one history"):
        tensors_of(state)
