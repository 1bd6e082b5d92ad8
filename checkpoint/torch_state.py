"""Live torch state <-> logical tensors and JSON-able objects; the only code that knows DTensors.

Logical names are ``model.<parameter>`` and ``optimizer.<parameter>.<state>``: the same with and
without DDP, ``torch.compile`` and activation-checkpointing wrappers, in any nesting.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from everstep.checkpoint.errors import LayoutError, StateError, StateMismatchError
from everstep.checkpoint.layout import Box, Fragment, TensorSpec
from everstep.checkpoint.pack import StridedBytes

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "DistributedDataParallel": "module",
}
"""Class name of a wrapper -> name of its only child; the child's name is left out."""


@runtime_checkable
class Stateful(Protocol):
    """Anything with a JSON-able state: scheduler, data stream, the user's own objects."""

    def state_dict(self) -> dict[str, Any]:
        """The state, JSON-able."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take a state over."""
        ...


class State:
    """The live state of a run; names what a checkpoint holds.

    Args:
        model: parameters and persistent buffers are saved; DTensors are saved by shard.
        optimizer: one optimizer over parameters of ``model``.
        objects: anything with JSON-able ``state_dict()``/``load_state_dict()``, by name.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        **objects: Stateful,
    ) -> None:
        for name, value in objects.items():
            if not isinstance(value, Stateful):
                raise StateError(
                    f"State({name}=...): {type(value).__name__} has no state_dict and "
                    "load_state_dict"
                )
        self.model, self.optimizer, self.objects = model, optimizer, objects


@dataclass(frozen=True)
class LiveTensor:
    """The part of a logical tensor that this rank holds."""

    fragment: Fragment
    local: torch.Tensor
    """Shares storage with the live tensor; its shape is ``fragment.box.shape``."""


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers under their logical names; tied ones once.

    Raises:
        StateError: a module keeps extra state, which a checkpoint cannot carry.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # an evaluation leaves the root's parameters gathered
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in _walk(module, ""):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    hidden = _WRAPPERS.get(type(module).__name__)
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        raise StateError(
            f"module {prefix[:-1] or type(module).__name__!r} defines get_extra_state: keep such "
            "state in buffers, or in an object given to State(name=object)"
        )
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, buffer
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, prefix if name == hidden else f"{prefix}{name}.")


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
        LayoutError: a placement that is no plain shard or replica (Partial, two strided axes).
    """
    begin, end = [0] * len(shape), list(shape)
    plain: list[tuple[int, int]] = []
    strided: list[tuple[int, int]] = []
    for axis, placement in enumerate(placements):
        if isinstance(placement, _StridedShard):
            strided.append((axis, placement.dim))
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


def live_tensor(name: str, tensor: torch.Tensor) -> LiveTensor:
    """Describe a tensor that is plain (the same on every rank) or a DTensor.

    Raises:
        LayoutError: its layout or dtype cannot be saved.
    """
    detached = tensor.detach()
    if detached.dtype not in DTYPE_NAMES:
        raise LayoutError(f"tensor {name!r}: dtype {detached.dtype} cannot be saved")
    spec = TensorSpec(name, DTYPE_NAMES[detached.dtype], tuple(detached.shape))
    if not isinstance(detached, DTensor):
        return LiveTensor(Fragment(spec, spec.whole), detached)
    local = detached.to_local()
    mesh = detached.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise LayoutError(f"tensor {name!r} lives on a mesh that this rank is not part of")
    box = intervals(spec.shape, tuple(detached.placements), tuple(mesh.shape), tuple(coordinate))
    if box.shape != tuple(local.shape):
        raise LayoutError(
            f"tensor {name!r} of shape {spec.shape} with placements {detached.placements} on mesh "
            f"{tuple(mesh.shape)}: the local shard is {tuple(local.shape)}, expected {box.shape}"
        )
    return LiveTensor(Fragment(spec, box), local)


def tensors_of(state: State) -> dict[str, LiveTensor]:
    """All tensors of model and optimizer that this rank holds, by logical name."""
    found = {
        f"model.{n}": live_tensor(f"model.{n}", t) for n, t in named_tensors(state.model).items()
    }
    if state.optimizer is not None:
        for parameter, parameter_name in _optimizer_names(state).items():
            for key, value in state.optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    name = f"optimizer.{parameter_name}.{key}"
                    found[name] = live_tensor(name, value)
    return found


def objects_of(state: State) -> dict[str, Any]:
    """Everything else, JSON-able; the same on every rank.

    Raises:
        StateError: something is not JSON-able.
    """
    found: dict[str, Any] = {}
    if state.optimizer is not None:
        names = _optimizer_names(state)
        found["optimizer"] = {
            "groups": [
                {
                    **{k: v for k, v in g.items() if k != "params"},
                    "params": [names[p] for p in g["params"]],
                }
                for g in state.optimizer.param_groups
            ],
            "values": {
                names[p]: plain
                for p, values in state.optimizer.state.items()
                if (plain := {k: v for k, v in values.items() if not isinstance(v, torch.Tensor)})
            },
        }
    for name, value in state.objects.items():
        found[f"object.{name}"] = value.state_dict()
    for name, value in found.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as e:
            raise StateError(
                f"the state of {name!r} is not JSON-able ({e}): a checkpoint keeps numbers, text, "
                "lists and mappings; keep tensors in the model's buffers"
            ) from None
    return found


def load_objects(state: State, stored: Mapping[str, Any], where: str) -> None:
    """Inverse of ``objects_of``.

    Raises:
        StateMismatchError: the checkpoint has other objects or other optimizer groups.
    """
    wanted = {f"object.{n}" for n in state.objects} | (
        {"optimizer"} if state.optimizer is not None else set()
    )
    differences = [f"{n!r} is not in the checkpoint" for n in sorted(wanted - stored.keys())]
    differences += [f"its {n!r} is not in this run" for n in sorted(stored.keys() - wanted)]
    if differences:
        raise StateMismatchError(where, differences)
    if state.optimizer is not None:
        _load_optimizer_objects(state, stored["optimizer"], where)
    for name, value in state.objects.items():
        value.load_state_dict(stored[f"object.{name}"])


def materialise_optimizer(state: State, stored: Mapping[str, TensorSpec]) -> None:
    """Create the optimizer's state tensors that a checkpoint holds, to be loaded into.

    Optimizers create them at their first step; a resumed run has made none yet. A tensor of the
    parameter's global shape is laid out as the parameter, any other is whole on every rank.
    """
    if state.optimizer is None:
        return
    by_parameter: dict[str, list[tuple[str, TensorSpec]]] = {}
    for name, spec in stored.items():
        if name.startswith("optimizer."):
            parameter_name, _, key = name.removeprefix("optimizer.").rpartition(".")
            by_parameter.setdefault(parameter_name, []).append((key, spec))
    names = _optimizer_names(state)
    for group in state.optimizer.param_groups:
        on_device = bool(group.get("fused") or group.get("capturable"))
        for parameter in group["params"]:
            values = state.optimizer.state[parameter]
            for key, spec in by_parameter.get(names[parameter], []):
                if isinstance(values.get(key), torch.Tensor):
                    continue
                dtype = _DTYPES[spec.dtype]
                if spec.shape == tuple(parameter.shape) and key != "step":
                    values[key] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
                else:
                    device = parameter.device if on_device else "cpu"
                    values[key] = torch.zeros(spec.shape, dtype=dtype, device=device)
            if not values:
                del state.optimizer.state[parameter]


def strided_bytes(tensor: torch.Tensor) -> StridedBytes:
    """The bytes of a CPU tensor, in place, whatever its strides."""
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    item = tensor.element_size()
    return StridedBytes(
        storage.numpy(), tensor.storage_offset() * item, tuple(s * item for s in tensor.stride())
    )


def _optimizer_names(state: State) -> dict[torch.Tensor, str]:
    assert state.optimizer is not None
    names = {tensor: name for name, tensor in named_tensors(state.model).items()}
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in names:
                raise StateError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is "
                    "not in the model: build the optimizer after wrapping and sharding the model"
                )
    return {p: names[p] for g in state.optimizer.param_groups for p in g["params"]}


def _load_optimizer_objects(state: State, stored: Mapping[str, Any], where: str) -> None:
    assert state.optimizer is not None
    names = _optimizer_names(state)
    groups = state.optimizer.param_groups
    mine = [[names[p] for p in g["params"]] for g in groups]
    theirs = [g["params"] for g in stored["groups"]]
    if mine != theirs:
        raise StateMismatchError(where, ["the optimizer's parameter groups are others"])
    for group, saved in zip(groups, stored["groups"], strict=True):
        for key, value in saved.items():
            if key != "params":
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    by_name = {name: p for p, name in names.items()}
    for name, values in stored["values"].items():
        state.optimizer.state[by_name[name]].update(values)
