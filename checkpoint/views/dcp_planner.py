"""Planners for torch DCP that know the true boxes of DTensors.

DCP takes the box of a DTensor's shard from torch's ``compute_local_shape_and_global_offset``, which
is wrong for some sizes that tensor parallelism does not divide, FSDP2 being on top of it (1001 rows
on dp4 x tp2; torch 2.11 to 2.13 at least). DCP's own planners then refuse to save ("overlapping
chunks"), or save what they cannot load. These two use ``torch_layout.intervals`` instead, which is
asserted against the shard; for every other layout they do what the default planners do.
"""

from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, WriteItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from everstep.checkpoint.errors import LayoutError
from everstep.checkpoint.layout import Box
from everstep.checkpoint.torch_layout import live_tensor


class SavePlanner(DefaultSavePlanner):
    """DCP's default planner, with the true boxes of unevenly sharded DTensors."""

    def create_local_plan(self) -> SavePlan:
        """The default plan with every DTensor's box corrected; empty shards are not saved."""
        plan = super().create_local_plan()
        items = [self._corrected(item) for item in plan.items]
        self.plan = replace(plan, items=[item for item in items if item is not None])
        return self.plan

    def _corrected(self, item: WriteItem) -> WriteItem | None:
        tensor = self.state_dict.get(item.index.fqn)
        if not isinstance(tensor, DTensor) or item.tensor_data is None:
            return item
        box = true_box(item.index.fqn, tensor)
        if not box.size and tensor.numel():
            return None
        chunk = ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape))
        return replace(
            item,
            index=MetadataIndex(item.index.fqn, box.offset, item.index.index),
            tensor_data=replace(item.tensor_data, chunk=chunk),
        )


class LoadPlanner(DefaultLoadPlanner):
    """DCP's default planner, with the true boxes of unevenly sharded DTensors."""

    def create_local_plan(self) -> LoadPlan:
        """The default plan, with the reads of every DTensor planned anew."""
        plan = super().create_local_plan()
        assert self.metadata is not None
        items = [item for item in plan.items if item.dest_index.fqn not in self._dtensors()]
        for name, tensor in self._dtensors().items():
            stored = self.metadata.state_dict_metadata.get(name)
            here = tensor.device_mesh.get_coordinate() is not None
            if here and isinstance(stored, TensorStorageMetadata):
                items += _reads(name, stored, true_box(name, tensor))
        return replace(plan, items=items)

    def _dtensors(self) -> dict[str, DTensor]:
        return {n: t for n, t in self.state_dict.items() if isinstance(t, DTensor)}


def true_box(name: str, tensor: DTensor) -> Box:
    """The box of a DTensor's shard on this rank.

    Raises:
        LayoutError: its layout or dtype cannot be saved.
    """
    return live_tensor(name, tensor).fragment.box


def check_write(planner: Any, item: WriteItem) -> None:
    """Refuse the box that a planner gives for a DTensor where it is not the true one.

    Raises:
        LayoutError: it is not.
    """
    if isinstance(planner, DefaultSavePlanner) and item.tensor_data is not None:
        tensor = planner.state_dict.get(item.index.fqn)
        if isinstance(tensor, DTensor):
            _check(item.index.fqn, tensor, item.tensor_data.chunk, "SavePlanner")


def check_read(planner: Any, name: str) -> None:
    """Refuse to read into a DTensor whose shard is not where DCP's own planner thinks.

    Raises:
        LayoutError: it is not.
    """
    if isinstance(planner, DefaultLoadPlanner) and not isinstance(planner, LoadPlanner):
        tensor = planner.state_dict.get(name)
        if isinstance(tensor, DTensor):
            for chunk in tensor.__create_chunk_list__():
                _check(name, tensor, chunk, "LoadPlanner")


def _check(name: str, tensor: DTensor, chunk: ChunkStorageMetadata, way_out: str) -> None:
    true, box = true_box(name, tensor), Box(tuple(chunk.offsets), tuple(chunk.sizes))
    if box != true and (box.size or true.size):
        raise LayoutError(
            f"the planner takes the shard of {name!r} for the box {box.shape} at {box.offset}, it "
            f"is {true.shape} at {true.offset}: torch miscounts uneven shards; pass "
            f"planner={way_out}() of everstep.checkpoint.views.dcp"
        )


def _reads(name: str, stored: TensorStorageMetadata, box: Box) -> list[ReadItem]:
    if not box.size:
        return []
    chunk = ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape))
    return create_read_items_for_chunk_list(name, stored, [chunk])
