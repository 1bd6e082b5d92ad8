"""Putting a model on a mesh: tensor parallelism, stages, compilation, recomputation, FSDP2.

Recomputation and compilation replace a block's ``forward`` rather than wrapping the block: names of
parameters stay what they are, and FSDP2's hooks stay outside, so that weights are gathered once.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from everstep.trainer.config import ParallelConfig
from everstep.trainer.errors import ConfigError
from everstep.trainer.mesh_shape import MeshShape
from everstep.trainer.model import Llama
from everstep.trainer.pipeline_plan import count_stages, split_stages
from everstep.trainer.stage import Stage, split_model
from everstep.trainer.tensor_parallel import apply_tensor_parallel

KEEP_GATHERED_BYTES = 1 << 30
"""Weights up to this size stay gathered between forward and backward: one gather less per step."""


def parallelize(
    model: nn.Module, mesh: DeviceMesh, shape: MeshShape, parallel: ParallelConfig
) -> nn.Module:
    """Distribute ``model`` over ``mesh`` in place and return it; ``init.materialise`` comes next.

    With mesh.pp > 1 it is left with this rank's pipeline stages, which ``pipeline.Pipeline`` runs.
    A single rank in fp32 needs no FSDP2 and gets none. Gradients become means over data-parallel
    ranks: for the mean over all tokens of a step, backpropagate the sum over a micro batch times
    ``shape.dp / tokens of the step``. Raises ConfigError for a user's model with mesh.tp > 1 or
    mesh.pp > 1.
    """
    for axis, size in (("tp", shape.tp), ("pp", shape.pp)):
        if size > 1 and not isinstance(model, Llama):
            raise ConfigError(
                f"mesh.{axis}={size} needs the built-in model, but model.factory is set: use "
                "mesh.dp_shard to share its memory instead"
            )
    if shape.tp > 1 and isinstance(model, Llama):
        apply_tensor_parallel(model, mesh["tp"])
    if shape.pp > 1 and isinstance(model, Llama):
        spans = split_stages(model.shape, model.seq_len, count_stages(parallel, shape.pp))
        split_model(model, spans[mesh["pp"].get_local_rank() :: shape.pp])
    for block in _blocks(model):
        if parallel.compile:
            # Shapes never change in training. All blocks of the built-in model run one code in one
            # graph, which is compiled once; a user's block may break into several.
            fullgraph = isinstance(model, Llama)
            block.forward = torch.compile(block.forward, dynamic=False, fullgraph=fullgraph)
        if parallel.activation_checkpointing:
            block.forward = _recomputed(block.forward)
    if shape.dp > 1 or parallel.precision == "bf16":
        _shard(model, mesh, shape, parallel)
    return model


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Whether the next backward passes reduce gradients over data-parallel ranks.

    Off for all but the last micro batch of a step; without FSDP2 there is nothing to do.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)


def _shard(model: nn.Module, mesh: DeviceMesh, shape: MeshShape, parallel: ParallelConfig) -> None:
    data_mesh = mesh["dp_replicate", "dp_shard"] if shape.dp_replicate > 1 else mesh["dp_shard"]
    block_policy, root_policy = MixedPrecisionPolicy(), MixedPrecisionPolicy()
    if parallel.precision == "bf16":
        # The built-in model's blocks get bf16 activations and fp32 rotary tables: cast neither.
        block_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16,
            reduce_dtype=torch.float32,
            cast_forward_inputs=not isinstance(model, Llama),
        )
        root_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
        )
    roots = model.roots if isinstance(model, Llama) else [model]
    # A pipeline passes its blocks once per micro-batch, before the first gradient is needed.
    in_pipeline = shape.pp > 1
    reshard = not in_pipeline and _gathered_bytes(model, shape, parallel) > KEEP_GATHERED_BYTES
    blocks = list(_blocks(model))
    for block in blocks:
        # The last block's backward follows its forward at once.
        fully_shard(
            block,
            mesh=data_mesh,
            mp_policy=block_policy,
            reshard_after_forward=reshard and block is not blocks[-1],
        )
    for root in roots:
        inner = isinstance(root, Stage) and not root.span.last
        policy = block_policy if inner else root_policy
        fully_shard(root, mesh=data_mesh, mp_policy=policy, reshard_after_forward=False)


def _gathered_bytes(model: nn.Module, shape: MeshShape, parallel: ParallelConfig) -> int:
    """Size of one rank's weights when all of them are gathered."""
    item_bytes = 2 if parallel.precision == "bf16" else 4
    return sum(parameter.numel() for parameter in model.parameters()) * item_bytes // shape.tp


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The repeated parts of a model: outermost children of ModuleLists that can be called."""
    for child in module.children():
        container = isinstance(child, (nn.ModuleList, nn.ModuleDict))
        if isinstance(module, nn.ModuleList) and not container:
            yield child
        else:
            yield from _blocks(child)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` that keeps its inputs only and runs again in backward."""

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return recomputed
