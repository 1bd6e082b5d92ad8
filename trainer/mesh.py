"""The device mesh of a run: one axis per kind of parallelism."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from everstep.trainer.mesh_shape import AXES, MeshShape


def build_mesh(shape: MeshShape, device_type: str) -> DeviceMesh:
    """The mesh over all ranks of the default process group, axes ``AXES`` (size 1 where unused).

    Rank r sits at ``shape.coordinate(r)``. Creates one process group per axis: every rank calls it.
    """
    return init_device_mesh(device_type, shape.sizes, mesh_dim_names=AXES)
