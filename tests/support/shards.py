"""How tensors lie on meshes: what is drawn of it, and what torch.chunk makes of it."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from everstep.checkpoint.layout import Box
from everstep.checkpoint.torch_layout import intervals

SIZES = st.one_of(st.integers(0, 14), st.sampled_from([1001, 64]))


@dataclass(frozen=True)
class MeshLayout:
    """How one tensor lies on a mesh."""

    shape: tuple[int, ...]
    mesh: tuple[int, ...]
    placements: tuple[Placement, ...]

    def coordinates(self) -> Iterator[tuple[int, ...]]:
        """The place of every rank, in row-major order."""
        return itertools.product(*map(range, self.mesh))

    def boxes(self) -> list[Box]:
        """The box of every rank."""
        return [intervals(self.shape, self.placements, self.mesh, c) for c in self.coordinates()]


@st.composite
def mesh_layouts(
    draw: st.DrawFn, max_ranks: int = 16, shape: tuple[int, ...] | None = None
) -> MeshLayout:
    """FSDP2, HSDP, tensor parallelism and mixtures: what everstep and others make of a tensor."""
    if shape is None:
        shape = tuple(draw(st.lists(SIZES, min_size=1, max_size=3)))
    mesh = tuple(
        draw(
            st.lists(st.integers(1, 4), min_size=1, max_size=3).filter(
                lambda sizes: math.prod(sizes) <= max_ranks
            )
        )
    )
    kinds = st.one_of(st.none(), st.integers(0, len(shape) - 1)) if shape else st.none()
    shards = [draw(kinds) for _ in mesh]
    placements: list[Placement] = [Replicate() if d is None else Shard(d) for d in shards]
    fsdp_axis = draw(st.integers(0, len(mesh) - 1))
    later = zip(mesh[fsdp_axis + 1 :], shards[fsdp_axis + 1 :], strict=True)
    follows = [size for size, dim in later if dim == 0]
    if follows and draw(st.booleans()):
        placements[fsdp_axis] = _StridedShard(0, split_factor=math.prod(follows))
    return MeshLayout(shape, mesh, tuple(placements))


def by_chunks(layout: MeshLayout, coordinate: tuple[int, ...]) -> list[torch.Tensor]:
    """Per dim the indices that a rank holds, by torch.chunk on the indices themselves."""
    held = [torch.arange(n) for n in layout.shape]
    axes = [a for a, p in enumerate(layout.placements) if isinstance(p, Shard)]
    axes += [a for a, p in enumerate(layout.placements) if isinstance(p, _StridedShard)]
    for axis in axes:
        placement = layout.placements[axis]
        assert isinstance(placement, Shard | _StridedShard)
        pieces = held[placement.dim].chunk(layout.mesh[axis])
        index = coordinate[axis]
        held[placement.dim] = pieces[index] if index < len(pieces) else torch.arange(0)
    return held
