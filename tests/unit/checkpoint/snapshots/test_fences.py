"""Hooks on optimizers, on their own."""

import copy
import threading

import pytest
import torch
from torch import nn

from everstep.checkpoint.errors import StateError
from everstep.checkpoint.snapshots.fences import Fences


def _optimizer(kind: type[torch.optim.Optimizer] = torch.optim.SGD) -> torch.optim.Optimizer:
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    return kind(model.parameters(), lr=0.1)  # type: ignore[call-arg]


def test_the_function_runs_before_every_update_and_before_other_hooks() -> None:
    optimizer = _optimizer()
    order: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: order.append("another"))
    fences = Fences(lambda: order.append("fence"))
    fences.watch([optimizer])
    fences.watch([optimizer])
    before = optimizer.param_groups[0]["params"][0].clone()
    optimizer.register_step_pre_hook(
        lambda *_: order.append(str(torch.equal(before, optimizer.param_groups[0]["params"][0])))
    )
    optimizer.step()
    assert order == ["fence", "another", "True"]
    assert fences.count(optimizer) == 1
    fences.close()
    fences.close()
    optimizer.step()
    assert order.count("fence") == 1


def test_it_is_proven_when_all_have_fired_or_by_hand() -> None:
    one, two = _optimizer(), _optimizer(torch.optim.AdamW)
    fences = Fences(lambda: None)
    assert not fences.proven
    fences.watch([one, two])
    one.step()
    assert not fences.proven
    two.step()
    assert fences.proven
    other = Fences(lambda: None)
    other.passed()
    assert other.proven


def test_an_optimizer_that_is_gone_is_not_waited_for() -> None:
    old, new = _optimizer(), _optimizer()
    calls: list[int] = []
    fences = Fences(lambda: calls.append(1))
    fences.watch([old])
    fences.watch([new])
    new.step()
    assert fences.proven
    old.step()
    assert len(calls) == 1


def test_lost_hooks_are_set_again() -> None:
    optimizer = _optimizer()
    calls: list[int] = []
    fences = Fences(lambda: calls.append(1))
    fences.watch([optimizer])
    copied = copy.deepcopy(optimizer)
    fences.watch([copied])
    copied.step()
    assert len(calls) == 1
    copied._optimizer_step_pre_hooks.clear()
    fences.watch([copied])
    copied.step()
    assert len(calls) == 2


def test_what_only_wraps_an_optimizer_is_refused() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner = inner

    with pytest.raises(StateError, match="Wrapper only wraps an optimizer"):
        Fences(lambda: None).watch([Wrapper(_optimizer())])


def test_a_step_on_another_thread_is_fenced() -> None:
    optimizer, seen = _optimizer(), []
    fences = Fences(lambda: seen.append(threading.current_thread().name))
    fences.watch([optimizer])
    thread = threading.Thread(target=optimizer.step, name="stepper")
    thread.start()
    thread.join()
    assert seen == ["stepper"]
