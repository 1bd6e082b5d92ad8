"""Training loops that change every tensor of their state as early as they may."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from everstep.checkpoint.torch_state import State
from tests.support.checkpoints import Counter

Optimizers = Sequence[torch.optim.Optimizer]


class OddModel(nn.Module):
    """Every kind of tensor that a model has: changed by optimizers, in forward, or never."""

    seen: torch.Tensor
    replaced: torch.Tensor
    masks: torch.Tensor

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, width)
        self.renormalised = nn.Embedding(16, width, max_norm=0.5)
        self.norm = nn.BatchNorm1d(width)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(width, width))
        self.transposed = nn.Parameter(torch.randn(width, width + 2).t() / width)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.bf16 = nn.Parameter(torch.randn(width, width, dtype=torch.bfloat16))
        self.frozen = nn.Parameter(torch.randn(width, width), requires_grad=False)
        self.head = nn.Linear(width, 16, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("replaced", torch.zeros(3))
        self.register_buffer("masks", torch.zeros(4, dtype=torch.bool))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch,) -> (batch, 16)."""
        self.seen += 1
        self.replaced = self.replaced + 1.0
        self.masks.logical_not_()
        x = self.embedding(tokens) + self.renormalised(tokens)
        x = self.spectral(self.norm(x)) + x @ self.frozen + x @ self.bf16.to(x.dtype)
        x = x @ self.transposed.t()[:, : x.shape[1]] * self.scale + self.empty.sum()
        return self.head(x)


class Ema:
    """A running mean of parameters, kept by whoever owns it: changed right after each save."""

    def __init__(self, model: nn.Module) -> None:
        self._means = [p.detach().clone() for p in model.parameters()]
        self.updates = 0

    def update(self) -> None:
        """Change everything."""
        for mean in self._means:
            mean.mul_(0.9).add_(0.01)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"means": self._means, "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._means, self.updates = state_dict["means"], state_dict["updates"]


@dataclass(kw_only=True)
class Training:
    """A state and how to take a step of it."""

    state: State
    step: Callable[[torch.Tensor], None]
    """From a loss to updated parameters."""
    ema: Ema
    objects: dict[str, Counter] = field(default_factory=dict)

    def changed_after_save(self) -> None:
        """Change everything that a save has to take at once."""
        with torch.no_grad():
            for buffer in self.state.model.buffers():
                buffer.logical_not_() if buffer.dtype == torch.bool else buffer.add_(1)
        self.ema.update()
        self.objects["data"].value += 1
        for optimizer in self.state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * 1.01
        torch.rand(3), random.random(), np.random.rand()

    def train(self) -> None:
        """Forward, backward, update."""
        tokens = torch.randint(0, 16, (8,))
        logits = self.state.model(tokens)
        self.step(nn.functional.cross_entropy(logits, tokens))


def training(make: "Flavour", width: int = 8) -> Training:
    """A loop of a flavour; its optimizers change all they can right after their first hook."""
    model = OddModel(width)
    optimizers, step, objects = make(model)
    ema, data = Ema(model), Counter(0)
    state = State(model=model, optimizer=list(optimizers), ema=ema, data=data, **objects)

    @torch.compiler.disable
    def change(*_: object) -> None:
        with torch.no_grad():
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.data.add_(0.001)
                for values in optimizer.state.values():
                    for key, value in values.items():
                        if torch.is_tensor(value) and key != "step":
                            value.mul_(1.01)

    for optimizer in optimizers:
        optimizer.register_step_pre_hook(change)
    return Training(state=state, step=step, ema=ema, objects={"data": data})


Made = tuple[Optimizers, Callable[[torch.Tensor], None], dict[str, Any]]
Flavour = Callable[[nn.Module], Made]


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that want gradients."""
    return [p for p in model.parameters() if p.requires_grad]


def _stepping(*optimizers: torch.optim.Optimizer) -> Made:
    def step(loss: torch.Tensor) -> None:
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return optimizers, step, {}


def plain(kind: type[torch.optim.Optimizer], **options: Any) -> Flavour:
    """One optimizer over everything."""
    return lambda model: _stepping(kind(trained(model), **options))


def adafactor(model: nn.Module) -> Made:
    """Its own kind of state; it cannot do anything with an empty parameter."""
    return _stepping(torch.optim.Adafactor([p for p in trained(model) if p.numel()], lr=0.001))


class OwnSgd(torch.optim.Optimizer):
    """Somebody's own: changes data past autograd, and replaces a tensor of its state."""

    def __init__(self, parameters: Any, lr: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state.setdefault("sum", torch.zeros_like(p)).add_(p.grad)
                state["last"] = p.grad.clone()
                p.data -= group["lr"] * p.grad


class CallsSuper(torch.optim.AdamW):
    """Its hooks run twice per step."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return super().step(closure)


def muon_and_adamw(model: nn.Module) -> Made:
    """Two optimizers that share out the parameters."""
    matrices = [p for p in trained(model) if p.ndim == 2 and p.numel()]
    others = [p for p in trained(model) if not any(p is m for m in matrices)]
    return _stepping(
        torch.optim.Muon(matrices, lr=0.001), torch.optim.AdamW(others, lr=0.001, fused=False)
    )


def scheduled(model: nn.Module) -> Made:
    """A scheduler wraps the step of the optimizer."""
    optimizer = torch.optim.AdamW(trained(model), lr=0.001)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))
    optimizers, step, _ = _stepping(optimizer)

    def step_both(loss: torch.Tensor) -> None:
        step(loss)
        scheduler.step()

    return optimizers, step_both, {"scheduler": _NoLambda(scheduler)}


class _NoLambda:
    """A scheduler whose state has no functions."""

    def __init__(self, scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
        self._scheduler = scheduler

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self._scheduler.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._scheduler.last_epoch = state_dict["last_epoch"]


def scaled(model: nn.Module) -> Made:
    """A gradient scaler, which finds infinities and skips each third step."""
    optimizer = torch.optim.SGD(trained(model), lr=0.001, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    steps = 0

    def step(loss: torch.Tensor) -> None:
        nonlocal steps
        steps += 1
        scaler.scale(loss).backward()
        if steps % 3 == 0:
            next(p for p in trained(model) if p.grad is not None).grad.fill_(torch.inf)  # type: ignore[union-attr]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return (optimizer,), step, {"scaler": scaler}


def in_backward(model: nn.Module) -> Made:
    """One optimizer per parameter, each steps as soon as its gradient is there."""
    optimizers = []
    for parameter in trained(model):
        optimizer = torch.optim.SGD([parameter], lr=0.001, momentum=0.9)
        optimizers.append(optimizer)

        def update(_: torch.Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(update)
    return optimizers, lambda loss: loss.backward(), {}


def compiled(kind: type[torch.optim.Optimizer], **options: Any) -> Flavour:
    """The step of an optimizer goes through the compiler; that takes seconds to begin."""

    def make(model: nn.Module) -> Made:
        optimizer = kind(trained(model), **options)
        compiled_step = torch.compile(optimizer.step, backend="eager")

        def step(loss: torch.Tensor) -> None:
            loss.backward()
            compiled_step()
            optimizer.zero_grad()

        return (optimizer,), step, {}

    return make


FLAVOURS: dict[str, Flavour] = {
    "sgd": plain(torch.optim.SGD, lr=0.01, momentum=0.9, foreach=False),
    "sgd_foreach": plain(torch.optim.SGD, lr=0.01, momentum=0.9, foreach=True),
    "sgd_fused": plain(torch.optim.SGD, lr=0.01, momentum=0.9, fused=True),
    "adamw_loop": plain(torch.optim.AdamW, lr=0.001, foreach=False, fused=False),
    "adamw_foreach": plain(torch.optim.AdamW, lr=0.001, foreach=True),
    "adamw_fused": plain(torch.optim.AdamW, lr=0.001, fused=True, amsgrad=True),
    "adafactor": adafactor,
    "muon_and_adamw": muon_and_adamw,
    "own": plain(OwnSgd),
    "calls_super": plain(CallsSuper, lr=0.001),
    "scheduled": scheduled,
    "scaled": scaled,
    "in_backward": in_backward,
}
"""By name."""
