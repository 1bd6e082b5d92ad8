"""Weight gradients come when they are asked for, and are those of autograd."""

import torch
from torch import nn

from everstep.trainer.model import Linear, RMSNorm
from everstep.trainer.split_backward import WeightGradients


def _stage() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Linear(6, 8), RMSNorm(8, 1e-5), nn.SiLU(), Linear(8, 4))


def _batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 5, 6, generator=generator).requires_grad_() for _ in range(2)]


def test_gradients_are_those_of_autograd_and_wait_for_their_turn() -> None:
    whole, split = _stage(), _stage()
    weights = WeightGradients(split)
    jobs = []
    for x, y in zip(_batches(), _batches(), strict=True):
        whole(x).square().sum().backward()
        split(y).square().sum().backward()
        torch.testing.assert_close(y.grad, x.grad)
        jobs.append(weights.take())
    assert split[0].weight.grad is None
    torch.testing.assert_close(split[1].weight.grad, whole[1].weight.grad)
    jobs[0]()
    assert split[0].weight.grad is not None
    jobs[1]()
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(split.get_parameter(name).grad, parameter.grad)


def test_a_job_is_done_once() -> None:
    split = _stage()
    weights = WeightGradients(split)
    split(_batches()[0]).sum().backward()
    job = weights.take()
    job()
    first = split[0].weight.grad.clone()
    job()
    weights.take()()
    assert torch.equal(split[0].weight.grad, first)
