"""The device mesh of a run: one axis per kind of parallelism."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from everstep.trainer.errors import ConfigError
from everstep.trainer.mesh_shape import MeshShape

AXES = ("dp_replicate", "dp_shard", "tp")
"""Mesh axes, slowest first: neighbouring ranks share a tensor-parallel group."""


def build_mesh(shape: MeshShape, device_type: str) -> DeviceMesh:
    """The mesh over all ranks of the default process group, axes ``AXES`` (size 1 where unused).

    Rank r sits at ``shape.coordinate(r)``. Creates one process group per axis: every rank calls it.
    Raises ConfigError for pipeline stages, which are not built yet.
    """
    if shape.pp != 1:
        raise ConfigError(f"mesh.pp={shape.pp} is not built yet: set mesh.pp=1")
    sizes = (shape.dp_replicate, shape.dp_shard, shape.tp)
    return init_device_mesh(device_type, sizes, mesh_dim_names=AXES)
