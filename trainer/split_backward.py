"""Weight gradients of linear maps apart from the backward pass, as zero-bubble schedules need them.

The backward pass of a stage computes the gradients of its activations, which the stage before it
waits for, and queues the gradients of its matrices; the schedule has those computed where it would
have been idle (Qi et al. 2023, Zero Bubble Pipeline Parallelism). All other weights are small, or
belong to no matrix product, and get their gradients at once.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from everstep.trainer.model import Linear
from everstep.trainer.sharded_weights import apply_function


class WeightGradients:
    """The gradients of one stage's matrices that wait to be computed.

    Args:
        stage: its linear maps no longer compute the gradients of their weights in backward.
    """

    def __init__(self, stage: nn.Module) -> None:
        self._waiting: list[Callable[[], None]] = []
        for module in stage.modules():
            if isinstance(module, Linear):
                module.forward = self._deferring(module)  # type: ignore[assignment, method-assign]

    def take(self) -> Callable[[], None]:
        """What computes the gradients queued since the last call and adds them to ``.grad``.

        ``dw_builder`` of torch's pipeline stages: called after the backward of each micro-batch.
        """
        waiting, self._waiting = self._waiting, []

        def compute() -> None:
            while waiting:
                waiting.pop(0)()

        return compute

    def _deferring(self, linear: Linear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            return apply_function(_InputGradientOnly, x, linear, self._defer)

        return forward

    def _defer(self, job: Callable[[], None]) -> None:
        self._waiting.append(job)


class _InputGradientOnly(torch.autograd.Function):
    """``x @ weight.T`` whose backward hands the gradient of the weight to ``defer``, as a job."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, linear: Linear, defer: Callable[[Callable[[], None]], None]
    ) -> Tensor:
        # Parameters that FSDP2 gathers come and go: take the one that this pass computes with.
        weight = linear.weight
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        ctx.save_for_backward(x, local)
        ctx.weight, ctx.defer = weight, defer
        return nn.functional.linear(x, local)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, local = ctx.saved_tensors
        gradient, weight = gradients[0], ctx.weight
        ctx.defer(lambda: _add_gradient(weight, gradient, x))
        return gradient @ local, None, None


@torch.no_grad()
def _add_gradient(weight: Tensor, gradient: Tensor, x: Tensor) -> None:
    """Add the gradient of ``weight`` in ``x @ weight.T`` to ``weight.grad``."""
    local = gradient.flatten(0, -2).T @ x.flatten(0, -2)
    if isinstance(weight, DTensor):
        mesh, placements = weight.device_mesh, weight.placements
        local = DTensor.from_local(local, mesh, placements, run_check=False)
    weight.grad = local if weight.grad is None else weight.grad.add_(local)
