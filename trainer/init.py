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

from everstep.checkpoint.layout import Box
from everstep.checkpoint.torch_layout import live_tensor
from everstep.trainer.config import ModelConfig
from everstep.trainer.model import Llama

_BLOCK_ELEMENTS = 1 << 20


def materialise(model: nn.Module, device: torch.device, seed: int) -> None:
    """Give a parallelised model its memory on ``device`` and its initial weights.

    A model that has memory already (a user's) is only moved to ``device``.
    """
    if not isinstance(model, Llama):
        model.to(device)
        return
    for root in model.roots:
        root.to_empty(device=device)
    model.tie()
    model.model.context.rotary.fill()
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
            box = live_tensor(name, parameter).fragment.box
            _fill_normal(local, parameter.shape[1], box, std, seed, name)


def initial_std(name: str, config: ModelConfig) -> float | None:
    """Standard deviation of the parameter ``name``; None for norm weights, which start at 1."""
    if "norm" in name.split(".")[-2]:
        return None
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return config.init_std / math.sqrt(2 * config.layers)
    return config.init_std


def _fill_normal(local: Tensor, width: int, box: Box, std: float, seed: int, name: str) -> None:
    """Fill ``local``, the part at ``box`` of a matrix of ``width`` columns."""
    row_start, column_start = box.offset
    row_end, column_end = row_start + box.shape[0], column_start + box.shape[1]
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
