"""What the checkpoint benchmark saves and loads: about 300 float32 tensors, on four layouts.

Every item's value follows from its tensor and position, so whatever has been loaded, on whatever
layout, can be checked without a second copy.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from checkpoint_io_files import page_aligned
from checkpoint_io_turns import BOXES, RANKS, ROWS, TP, Size
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from everstep.checkpoint.layout import Box
from everstep.checkpoint.torch_layout import intervals

_MESHES = {ROWS: {"dp": 4}, BOXES: {"rows": 2, "columns": 2}, TP: {"dp": 2, "tp": 2}}
_ALIGN_BYTES = 64


def placements_of(layout: str, name: str, dims: int) -> list[Placement]:
    """How a layout shards a tensor; ``TP`` is what FSDP2 over tensor parallelism makes."""
    if layout == ROWS:
        return [Shard(0)]
    if dims == 1:
        return [Shard(0), Replicate()]
    if layout == BOXES or name.endswith(("_o", "_down")):
        return [Shard(0), Shard(1)]
    return [_StridedShard(0, split_factor=2), Shard(0)]


def values(number: int, shape: tuple[int, ...], box: Box) -> np.ndarray:
    """The items of a box of the ``number``-th tensor, as uint32 of the box's shape."""
    at = np.zeros(box.shape, np.uint32)
    for dim, (begin, n) in enumerate(zip(box.offset, box.shape, strict=True)):
        step = math.prod(shape[dim + 1 :])
        where = np.arange(begin, begin + n, dtype=np.uint32) * np.uint32(step)
        at += where.reshape(-1, *[1] * (len(shape) - dim - 1))
    return (at + np.uint32(number * 7919)) * np.uint32(2654435761)


@dataclass(frozen=True, kw_only=True)
class Held:
    """What one rank holds of the state."""

    layout: str
    mesh: dict[str, int]
    coordinate: dict[str, int]
    memory: np.ndarray
    """Page-aligned; holds all local tensors."""
    locals: dict[str, np.ndarray]
    boxes: dict[str, Box]
    tensors: dict[str, torch.Tensor]
    """DTensors, plain tensors on one rank; each has a storage of its own, inside ``memory``."""
    module: nn.Module
    shapes: dict[str, tuple[int, ...]]

    def fill(self) -> None:
        """Give every item its value."""
        for number, (name, shape) in enumerate(self.shapes.items()):
            self.locals[name].view(np.uint32)[...] = values(number, shape, self.boxes[name])

    def wrong(self) -> list[str]:
        """Names of the tensors with an item that has another value."""
        return [
            name
            for number, (name, shape) in enumerate(self.shapes.items())
            if not np.array_equal(
                self.locals[name].view(np.uint32), values(number, shape, self.boxes[name])
            )
        ]


def memory_bytes(size: Size, ranks: int) -> int:
    """Enough for one rank's share on any layout (small tensors may be replicated twice)."""
    shapes = size.shapes().values()
    return sum(
        4 * math.prod(s) // (ranks if len(s) > 1 else max(1, ranks // 2)) + _ALIGN_BYTES
        for s in shapes
    )


def hold(size: Size, layout: str, rank: int, memory: np.ndarray | None = None) -> Held:
    """This rank's part of the state; all ranks make the same sharded layouts in the same order."""
    axes = _MESHES.get(layout, {})
    mesh_shape = tuple(axes.values())
    coordinate = tuple(int(i) for i in np.unravel_index(rank, mesh_shape)) if axes else ()
    mesh = (
        DeviceMesh("cpu", torch.arange(RANKS).reshape(mesh_shape), mesh_dim_names=tuple(axes))
        if axes
        else None
    )
    if memory is None:
        memory = page_aligned(memory_bytes(size, RANKS if axes else 1))
    locals_, boxes, tensors, at = {}, {}, {}, 0
    for name, shape in size.shapes().items():
        placements = placements_of(layout, name, len(shape)) if axes else []
        box = intervals(shape, tuple(placements), mesh_shape, coordinate)
        local = memory[at : at + 4 * box.size].view(np.float32).reshape(box.shape)
        at += -(-local.nbytes // _ALIGN_BYTES) * _ALIGN_BYTES
        tensor = torch.from_numpy(local)
        locals_[name], boxes[name] = local, box
        tensors[name] = (
            tensor
            if mesh is None
            else DTensor.from_local(
                tensor,
                mesh,
                placements,
                run_check=False,
                shape=torch.Size(shape),
                stride=torch.empty(shape, device="meta").stride(),
            )
        )
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return Held(
        layout=layout,
        mesh=axes or {"rank": 1},
        coordinate=dict(zip(axes, coordinate, strict=True)) or {"rank": 0},
        memory=memory,
        locals=locals_,
        boxes=boxes,
        tensors=tensors,
        module=module,
        shapes=size.shapes(),
    )
