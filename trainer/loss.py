"""Cross entropy over tokens, also of logits whose vocabulary is cut over tensor-parallel ranks."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from everstep.trainer.sharded_weights import apply_function

IGNORED = -100
"""Target of a token that does not count."""


def token_loss_sum(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """Sum over tokens of the cross entropy in nats: a scalar, fp32, the same on every tp rank.

    Targets equal to ``IGNORED`` do not count. ``logits_BLV`` may be a DTensor cut along V.
    """
    if isinstance(logits_BLV, DTensor):
        group = logits_BLV.device_mesh.get_group("tp")
        local_NV = logits_BLV.to_local().flatten(0, 1)
        return apply_function(_ShardedCrossEntropy, local_NV, targets_BL.flatten(), group)
    logits_NV = logits_BLV.flatten(0, 1).float()
    return F.cross_entropy(logits_NV, targets_BL.flatten(), ignore_index=IGNORED, reduction="sum")


class _ShardedCrossEntropy(torch.autograd.Function):
    """Cross entropy of logits cut along the vocabulary in even parts, one per rank of a group.

    The largest logit and the sum of exponentials are reduced over the ranks (Shoeybi et al. 2019,
    Megatron-LM, section 3): three values per token cross the wire, not a vocabulary.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, group: dist.ProcessGroup) -> Tensor:
        size = logits_NV.shape[1]
        shifted_NV = logits_NV.float()
        largest_N = shifted_NV.amax(1)
        dist.all_reduce(largest_N, dist.ReduceOp.MAX, group=group)
        shifted_NV = shifted_NV - largest_N[:, None]

        counted_N = targets_N != IGNORED
        column_N = targets_N - dist.get_rank(group) * size
        here_N = counted_N & (column_N >= 0) & (column_N < size)
        column_N1 = column_N.where(here_N, 0)[:, None]
        target_logit_N = shifted_NV.gather(1, column_N1)[:, 0] * here_N

        exp_NV = shifted_NV.exp_()
        sums_2N = torch.stack((exp_NV.sum(1), target_logit_N))
        dist.all_reduce(sums_2N, group=group)
        loss_N = (sums_2N[0].log() - sums_2N[1]) * counted_N

        ctx.save_for_backward(exp_NV, sums_2N[0], column_N1, here_N, counted_N)
        ctx.dtype = logits_NV.dtype
        return loss_N.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        exp_NV, sum_N, column_N1, here_N, counted_N = ctx.saved_tensors
        scale_N = gradients[0] * counted_N
        gradient_NV = exp_NV * (scale_N / sum_N)[:, None]
        gradient_NV.scatter_add_(1, column_N1, -(gradients[0] * here_N)[:, None])
        return gradient_NV.to(ctx.dtype), None, None
