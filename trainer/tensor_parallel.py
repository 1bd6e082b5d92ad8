"""Tensor parallelism with sequence parallelism for the built-in model.

Between blocks every tp rank holds its own part of the sequence; attention and MLP gather the
sequence, work on their share of heads or hidden width, and reduce-scatter the partial sums back
(Korthikanti et al. 2022). Embedding and head are cut over the vocabulary. All of it is hooks on the
modules plus weights that are DTensors over the ``tp`` axis, so that optimizer, clipping and
checkpoints see logical tensors; activations stay plain tensors.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from everstep.trainer.errors import ConfigError
from everstep.trainer.model import Block, Llama, RMSNorm
from everstep.trainer.sharded_weights import apply_function, local_weight

# torch 2.13 renamed both; the old names warn.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head", "embed_tokens")
"""Modules whose output (or vocabulary) is cut: dim 0 of the weight."""
ROWS = ("o_proj", "down_proj")
"""Modules whose input is cut: dim 1 of the weight."""


def apply_tensor_parallel(model: Llama, mesh: DeviceMesh) -> None:
    """Cut ``model`` (on the meta device) over the one-dimensional ``mesh``, in place.

    Raises ConfigError when a size of the model is not a multiple of the number of ranks.
    """
    tp = mesh.size()
    _check_sizes(model, tp)
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in COLUMNS:
            _shard_weight(module, mesh, Shard(0))
        elif leaf in ROWS:
            _shard_weight(module, mesh, Shard(1))
        elif isinstance(module, RMSNorm):
            _shard_weight(module, mesh, Replicate())
    model.tie()

    group, rank = mesh.get_group(), mesh.get_local_rank()

    def gather_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (apply_function(_GatherSequence, inputs[0], group), *inputs[1:])

    def scatter_output(module: nn.Module, inputs: Any, output: Tensor) -> Any:
        return apply_function(_ScatterSequence, output, group)

    def own_part(module: nn.Module, inputs: Any, output_BL: Tensor) -> Tensor:
        return output_BL.chunk(tp, dim=1)[rank]

    def logical_logits(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return DTensor.from_local(output, mesh, [Shard(2)], run_check=False)

    for layer in model.model.layers:
        assert isinstance(layer, Block)
        for part in (layer.self_attn, layer.mlp):
            part.register_forward_pre_hook(gather_input)
            part.register_forward_hook(scatter_output)
    embedding = model.model.embed_tokens
    embedding.forward = _vocabulary_lookup(embedding, rank)  # type: ignore[assignment]
    embedding.register_forward_hook(scatter_output)
    model.model.context.token_keys.register_forward_hook(own_part)
    model.lm_head.register_forward_pre_hook(gather_input)
    model.lm_head.register_forward_hook(logical_logits)


def _check_sizes(model: Llama, tp: int) -> None:
    shape = model.shape
    sizes = {
        "model.heads": shape.heads,
        "model.kv_heads": shape.kv_heads,
        "model.ffn_dim": shape.ffn_dim,
        "model.vocab_size": shape.vocab_size,
        "data.seq_len": model.seq_len,
    }
    for key, size in sizes.items():
        if size % tp:
            raise ConfigError(f"{key}={size} is not a multiple of mesh.tp={tp}: change one of them")


def _shard_weight(module: nn.Module, mesh: DeviceMesh, placement: Shard | Replicate) -> None:
    """Replace ``module.weight`` by a DTensor of which this rank holds its part."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    local = weight.data
    if isinstance(placement, Shard):
        local = local.chunk(mesh.size(), placement.dim)[mesh.get_local_rank()].contiguous()
    sharded = DTensor.from_local(local, mesh, [placement], run_check=False)
    module.weight = nn.Parameter(sharded, requires_grad=weight.requires_grad)


def _vocabulary_lookup(embedding: nn.Embedding, rank: int) -> Callable[[Tensor], Tensor]:
    """Forward of an embedding of which this rank holds some rows: zero for other ranks' tokens."""

    def lookup(tokens_BL: Tensor) -> Tensor:
        rows_VD = local_weight(embedding.weight)
        row_BL = tokens_BL - rank * rows_VD.shape[0]
        elsewhere_BL = (row_BL < 0) | (row_BL >= rows_VD.shape[0])
        found_BLD = F.embedding(row_BL.masked_fill(elsewhere_BL, 0), rows_VD)
        return found_BLD.masked_fill(elsewhere_BL[..., None], 0.0)

    return lookup


class _GatherSequence(torch.autograd.Function):
    """(B, L/tp, D) of every rank -> (B, L, D); the gradient is summed and scattered."""

    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x_BLD, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(gradients[0], ctx.group), None


class _ScatterSequence(torch.autograd.Function):
    """Partial sums (B, L, D) of every rank -> this rank's part (B, L/tp, D) of their sum."""

    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x_BLD, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _all_gather(gradients[0], ctx.group), None


def _all_gather(x_BLD: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts_TBLD = x_BLD.new_empty((dist.get_world_size(group), *x_BLD.shape))
    _all_gather_single(parts_TBLD.flatten(0, 1), x_BLD.contiguous(), group=group)
    return parts_TBLD.transpose(0, 1).flatten(1, 2)


def _reduce_scatter(x_BLD: Tensor, group: dist.ProcessGroup) -> Tensor:
    ranks = dist.get_world_size(group)
    parts_TBLD = x_BLD.unflatten(1, (ranks, -1)).transpose(0, 1).contiguous()
    sum_BLD = torch.empty_like(parts_TBLD[0])
    _reduce_scatter_single(sum_BLD, parts_TBLD.flatten(0, 1), group=group)
    return sum_BLD
