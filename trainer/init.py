"""Initial weights: a pure function of (seed, parameter name), whatever the layout.

A parameter is cut into blocks of whole rows; every block has its own generator, seeded by a hash of
seed, name and block. A rank draws only the blocks that its shard touches, so that start-up gets
cheaper with more shards and never holds more than one block beside the model.
"""

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from everstep.trainer.config import ModelConfig
from everstep.trainer.mesh import AXES
from everstep.trainer.model import Llama
from everstep.trainer.sharded_weights import cut_dims

_BLOCK_ELEMENTS = 1 << 20
Interval = tuple[int, int]
"""First index and end of a range along one dim."""


def materialise(model: nn.Module, device: torch.device, seed: int) -> None:
    """Give a parallelised model its memory on ``device`` and its initial weights.

    A model that has memory already (a user's) is only moved to ``device``.
    """
    if not isinstance(model, Llama):
        model.to(device)
        return
    model.to_empty(device=device)
    model.tie()
    model.model.rotary.fill()
    init_weights(model, seed)


@torch.no_grad()
def init_weights(model: Llama, seed: int) -> None:
    """Overwrite every parameter of ``model`` with its initial value."""
    for name, parameter in model.named_parameters():
        std = initial_std(name, model.config)
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if std is None:
            local.fill_(1.0)
        else:
            width = parameter.shape[1]
            _fill_normal(local, width, local_intervals(parameter), std, seed, name)


def initial_std(name: str, config: ModelConfig) -> float | None:
    """Standard deviation of the parameter ``name``; None for norm weights, which start at 1."""
    if "norm" in name.split(".")[-2]:
        return None
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return config.init_std / math.sqrt(2 * config.layers)
    return config.init_std


def local_intervals(parameter: Tensor) -> list[Interval]:
    """This rank's range along each dim of ``parameter``; the whole of it for a plain tensor.

    Tensor parallelism cuts first and FSDP2 cuts what is left, with the sizes of ``torch.chunk``:
    the innermost mesh axis is applied first. (``compute_local_shape_and_global_offset`` of
    torch 2.13 is wrong for some sizes that do not divide evenly.)
    """
    intervals = [(0, size) for size in parameter.shape]
    if not isinstance(parameter, DTensor):
        return intervals
    mesh = parameter.device_mesh
    cut = cut_dims(parameter)
    for axis in sorted(cut, key=AXES.index, reverse=True):
        dim = cut[axis]
        intervals[dim] = _chunk(intervals[dim], mesh[axis].size(), mesh.get_local_rank(axis))
    shape = tuple(end - start for start, end in intervals)
    if shape != tuple(parameter.to_local().shape):
        raise AssertionError(
            f"shard of {tuple(parameter.shape)} has shape {tuple(parameter.to_local().shape)}, "
            f"expected {shape} from {parameter.placements}"
        )
    return intervals


def _chunk(interval: Interval, chunks: int, index: int) -> Interval:
    """The ``index``-th part of ``interval`` cut as ``torch.chunk`` does; may be empty."""
    start, end = interval
    size = -(-(end - start) // chunks)
    return min(start + index * size, end), min(start + (index + 1) * size, end)


def _fill_normal(
    local: Tensor, width: int, intervals: list[Interval], std: float, seed: int, name: str
) -> None:
    """Fill ``local``, the part at ``intervals`` of a matrix of ``width`` columns."""
    (row_start, row_end), (column_start, column_end) = intervals
    rows_per_block = max(1, _BLOCK_ELEMENTS // width)
    for block in range(row_start // rows_per_block, -(-row_end // rows_per_block)):
        first = block * rows_per_block
        values = _normal_block(seed, name, block, rows_per_block, width)
        start, end = max(row_start, first), min(row_end, first + rows_per_block)
        part = values[start - first : end - first, column_start:column_end]
        local[start - row_start : end - row_start].copy_(part * std)


def _normal_block(seed: int, name: str, block: int, rows: int, width: int) -> Tensor:
    """Standard normal variates (rows, width), the same on every machine's CPU generator."""
    digest = hashlib.sha256(f"everstep init {seed} {name} {block}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randn(rows, width, generator=generator)
