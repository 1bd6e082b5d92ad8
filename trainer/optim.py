"""AdamW, its learning-rate schedule, and clipping by the global norm."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from everstep.trainer.config import AUTO, OptimConfig
from everstep.trainer.sharded_weights import cut_dims


def build_optimizer(model: nn.Module, optim: OptimConfig) -> AdamW:
    """Fused AdamW; weight decay on parameters of two or more dims only."""
    decay: list[Tensor] = []
    no_decay: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decay if parameter.dim() >= 2 else no_decay).append(parameter)
    groups = [
        {"params": decay, "weight_decay": optim.weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        fused=True,
    )


def build_scheduler(optimizer: AdamW, optim: OptimConfig, total_steps: int) -> LambdaLR:
    """``lr_factor`` applied to every group; call ``step()`` after each optimizer update."""
    return LambdaLR(optimizer, lambda step: lr_factor(step, optim, total_steps))


def lr_factor(step: int, optim: OptimConfig, total_steps: int) -> float:
    """Fraction of the peak learning rate that update ``step`` (from 0) of ``total_steps`` uses.

    Warm-up rises linearly and reaches the peak with its last update. Cosine (Loshchilov & Hutter
    2016) falls right after it, warm-up-stable-decay (Hu et al. 2024, MiniCPM; linear decay) at the
    end of the run; both reach ``min_lr_ratio`` with their last update and stay there.
    """
    done = step + 1
    if done <= optim.warmup_steps:
        return done / optim.warmup_steps
    if optim.schedule == "constant":
        return 1.0
    after_warmup = max(1, total_steps - optim.warmup_steps)
    if optim.schedule == "cosine":
        length = after_warmup if optim.decay_steps == AUTO else optim.decay_steps
        progress = _fraction(done - optim.warmup_steps, length)
        shape = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        wanted = after_warmup // 5 if optim.decay_steps == AUTO else optim.decay_steps
        length = min(max(1, wanted), after_warmup)
        shape = 1.0 - _fraction(done - (total_steps - length), length)
    return optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * shape


def _fraction(part: int, whole: int) -> float:
    return min(1.0, max(0.0, part / max(1, whole)))


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[Tensor],
    max_norm: float,
    *,
    pipeline: dist.ProcessGroup | None = None,
    copies: Collection[Tensor] = (),
) -> float:
    """Scale gradients so that their global 2-norm is at most ``max_norm`` (0: never); the norm.

    The norm is of the logical gradient: each shard counts once over every mesh axis it is cut
    along, replicas count once. One small collective per mesh axis in use, however many parameters.
    Every rank calls it with the same parameters and gets the same number. Ranks of ``pipeline``
    have different ones; those in ``copies`` are counted by another of them.
    """
    axis_groups: dict[str, dist.ProcessGroup] = {}
    locals_by_axes: dict[tuple[str, ...], list[Tensor]] = defaultdict(list)
    uncounted: list[Tensor] = []
    skipped = {id(parameter) for parameter in copies}
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        cut: tuple[str, ...] = ()
        local = gradient
        if isinstance(gradient, DTensor):
            mesh = gradient.device_mesh
            cut = tuple(cut_dims(gradient))
            axis_groups |= {name: mesh.get_group(name) for name in cut if name not in axis_groups}
            local = gradient.to_local()
        (uncounted if id(parameter) in skipped else locals_by_axes[cut]).append(local)
    if not locals_by_axes:
        return 0.0

    squares = {
        axes: nn.utils.get_total_norm(tensors, foreach=True).square()
        for axes, tensors in locals_by_axes.items()
    }
    for axis, group in axis_groups.items():
        cut_here = [axes for axes in squares if axis in axes]
        summed = torch.stack([squares[axes] for axes in cut_here])
        dist.all_reduce(summed, group=group)
        squares |= dict(zip(cut_here, summed, strict=True))
    square = torch.stack(list(squares.values())).sum()
    if pipeline is not None:
        dist.all_reduce(square, group=pipeline)
    norm = float(square.sqrt())
    if 0 < max_norm < norm:
        for tensors in (*locals_by_axes.values(), uncounted):
            if tensors:
                torch._foreach_mul_(tensors, max_norm / norm)
    return norm
