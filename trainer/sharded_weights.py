"""How a layer computes with its share of a tensor-parallel weight.

Under tensor parallelism (and inside FSDP2's forward) a weight is a DTensor over the ``tp`` axis.
Layers compute on plain local tensors, which spares DTensor's dispatch on every operation; these
functions are the whole bridge: forward takes the local part, backward returns a gradient with the
weight's own placements.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def local_weight(weight: Tensor) -> Tensor:
    """The part of ``weight`` that this rank computes with; a plain tensor is returned as it is.

    A sharded weight gets the gradient of its part. A replicated one is applied to different tokens
    on each rank, so that its gradient is summed over the ranks that hold a replica.
    """
    if not isinstance(weight, DTensor):
        return weight
    local = weight.to_local()
    if weight.placements[0].is_replicate():
        return apply_function(_SumGradient, local, weight.device_mesh.get_group(0))
    return local


def cut_dims(tensor: DTensor) -> dict[str, int]:
    """Mesh axis -> tensor dim, for the axes that ``tensor`` is cut along; replicas do not appear.

    (``placement.is_shard()`` is False for the strided shards of FSDP2 with tensor parallelism.)
    """
    names = tensor.device_mesh.mesh_dim_names or ()
    return {
        name: int(placement.dim)  # type: ignore[attr-defined]
        for name, placement in zip(names, tensor.placements, strict=True)
        if not placement.is_replicate()
    }


def apply_function(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """``function.apply(*arguments)``, which torch leaves untyped."""
    apply: Callable[..., Tensor] = function.apply
    return apply(*arguments)


class _SumGradient(torch.autograd.Function):
    """Identity whose gradient is summed over a process group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].clone()  # autograd may still need the original
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None
