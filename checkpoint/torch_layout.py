"""Live tensors as boxes of logical tensors; the only code that knows DTensors."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from everstep.checkpoint.errors import LayoutError
from everstep.checkpoint.layout import Box, Fragment, TensorSpec
from everstep.checkpoint.pack import StridedBytes, dense_strides

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0", torch.float4_e2m1fn_x2: "F4_X2",
    torch.complex128: "C128", torch.complex64: "C64", torch.complex32: "C32",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class LiveTensor:
    """The part of a logical tensor that this rank holds."""

    fragment: Fragment
    local: torch.Tensor
    """Shares storage with the live tensor; its shape is ``fragment.box.shape`` unless empty."""


def live_tensor(name: str, tensor: torch.Tensor) -> LiveTensor:
    """Describe a tensor that is plain (the same on every rank) or a DTensor.

    Raises:
        LayoutError: its layout or dtype cannot be saved.
    """
    return live_tensors({name: tensor})[name]


def live_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, LiveTensor]:
    """Describe tensors by their names; raises as ``live_tensor``."""
    boxes = _Boxes()
    with torch.no_grad():  # else autograd is told of the local tensors, which takes long
        return {name: _describe(name, tensor, boxes) for name, tensor in tensors.items()}


def _describe(name: str, tensor: torch.Tensor, boxes: "_Boxes") -> LiveTensor:
    if tensor.dtype not in DTYPE_NAMES:
        raise LayoutError(f"tensor {name!r}: dtype {tensor.dtype} cannot be saved")
    spec = TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
    if not isinstance(tensor, DTensor):
        local = tensor.detach()
        _check_bytes(name, local)
        return LiveTensor(Fragment(spec, spec.whole), local)
    local = tensor.to_local().detach()
    _check_bytes(name, local)
    box = boxes.of(spec.shape, tensor.device_mesh, tensor.placements)
    if box is None:  # on a mesh of other ranks: this one holds nothing of it
        nothing = (0,) * max(1, len(spec.shape))
        return LiveTensor(Fragment(spec, Box(nothing, nothing)), local)
    if box.shape != local.shape and (box.size or local.numel()):
        raise LayoutError(
            f"tensor {name!r} of shape {spec.shape} with placements {tensor.placements} on mesh "
            f"{tuple(tensor.device_mesh.shape)}: the local shard is {tuple(local.shape)}, expected "
            f"{box.shape}"
        )
    return LiveTensor(Fragment(spec, box if spec.size_bytes else spec.whole), local)


class _Boxes:
    """The boxes of the local shards of many tensors, which are cut in few ways."""

    def __init__(self) -> None:
        self._meshes: dict[int, tuple[tuple[int, ...], tuple[int, ...] | None]] = {}
        self._boxes: dict[Hashable, Box] = {}

    def of(
        self, shape: tuple[int, ...], mesh: DeviceMesh, placements: Sequence[Placement]
    ) -> Box | None:
        """See ``intervals``; None where this rank is not on the mesh."""
        if id(mesh) not in self._meshes:
            found = mesh.get_coordinate()
            self._meshes[id(mesh)] = tuple(mesh.shape), None if found is None else tuple(found)
        mesh_shape, coordinate = self._meshes[id(mesh)]
        if coordinate is None:
            return None
        kinds = tuple(map(type, placements))  # placements of different types may be equal
        key = (shape, mesh_shape, coordinate, placements, kinds)
        if key not in self._boxes:
            self._boxes[key] = intervals(shape, tuple(placements), mesh_shape, coordinate)
        return self._boxes[key]


def _check_bytes(name: str, local: torch.Tensor) -> None:
    """Refuse tensors whose values are not simply the bytes of their storage."""
    if local.is_meta:
        raise LayoutError(f"tensor {name!r} is on the meta device: give the model its memory first")
    if local.layout != torch.strided or local.is_conj() or local.is_neg():
        raise LayoutError(
            f"tensor {name!r} is sparse, or a lazy conjugate or negative: only plain dense tensors "
            "can be saved"
        )


def chunk_interval(extent: int, parts: int, index: int) -> tuple[int, int]:
    """[begin, end) of one of the pieces that ``torch.chunk`` cuts an extent into; may be empty."""
    width = -(-extent // parts)
    return min(index * width, extent), min((index + 1) * width, extent)


def intervals(
    shape: tuple[int, ...],
    placements: tuple[Placement, ...],
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...],
) -> Box:
    """The box of a DTensor's local shard.

    Per tensor dim, ``torch.chunk`` is applied for each mesh axis that shards it: plain ``Shard``
    axes first, in mesh order, then the ``_StridedShard`` one (FSDP2 cuts what tensor parallelism
    has left). torch's own ``compute_local_shape_and_global_offset`` gives other sizes for some
    uneven shapes; the caller asserts this box against the local shape.

    Raises:
        LayoutError: a placement that is no replica and no shard of these kinds.
    """
    begin, end = [0] * len(shape), list(shape)
    plain: list[tuple[int, int]] = []
    strided: list[tuple[int, int]] = []
    for axis, placement in enumerate(placements):
        if isinstance(placement, _StridedShard):
            strided.append((axis, placement.dim))
            inner = [
                size
                for size, other in zip(mesh_shape[axis:], placements[axis:], strict=True)
                if other.is_shard(placement.dim)
            ]
            if placement.split_factor != math.prod(inner):
                raise LayoutError(f"placements {placements}: strided by other than what follows")
        elif isinstance(placement, Shard):
            plain.append((axis, placement.dim))
        elif not isinstance(placement, Replicate):
            raise LayoutError(f"placement {placement} cannot be saved: redistribute it first")
    if len({dim for _, dim in strided}) != len(strided):
        raise LayoutError(f"placements {placements}: two strided shards of one dim")
    for axis, dim in plain + strided:
        lo, hi = chunk_interval(end[dim] - begin[dim], mesh_shape[axis], coordinate[axis])
        begin[dim], end[dim] = begin[dim] + lo, begin[dim] + hi
    return Box(tuple(begin), tuple(e - b for b, e in zip(begin, end, strict=True)))


def strided_bytes(tensor: torch.Tensor) -> StridedBytes:
    """The bytes of a CPU tensor, in place, whatever its strides."""
    item = tensor.element_size()
    if tensor.ndim and tensor.is_contiguous() and not tensor.is_complex():  # the usual case, faster
        data = tensor.detach().view(torch.uint8).numpy().reshape(-1)
        return StridedBytes(data, 0, dense_strides(tensor.shape, item))
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    strides = tuple(int(s) * item for s in tensor.stride())
    return StridedBytes(storage.numpy(), int(tensor.storage_offset()) * item, strides)
