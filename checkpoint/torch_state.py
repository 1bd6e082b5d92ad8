"""Live torch state <-> logical tensors and JSON-able objects.

Logical names are ``model.<parameter>`` and ``optimizer.<parameter>.<state>``: the same with and
without DDP, ``torch.compile``, FSDP2 and activation-checkpointing wrappers, in any nesting.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from everstep.checkpoint.errors import ManifestError, StateError, StateMismatchError
from everstep.checkpoint.layout import TensorSpec
from everstep.checkpoint.plain_json import Json, from_json, to_json
from everstep.checkpoint.torch_layout import LiveTensor, live_tensor
from everstep.checkpoint.torch_optimizer import (
    load_values,
    materialise,
    optimizer_tensors,
    optimizer_values,
)

_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "DistributedDataParallel": "module",
}
"""Class name of a wrapper -> name of its only child; the child's name is left out."""


@runtime_checkable
class Stateful(Protocol):
    """Anything with a plain state: scheduler, data stream, the user's own objects."""

    def state_dict(self) -> dict[str, Any]:
        """The state, the same on every rank: None, numbers, text, lists, tuples and mappings.

        Only rank 0 is asked.
        """
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take a state over, on every rank."""
        ...


class State:
    """The live state of a run; names what a checkpoint holds.

    Args:
        model: parameters and persistent buffers are saved; DTensors are saved by shard.
        optimizer: one optimizer over parameters of ``model``.
        objects: anything with a plain ``state_dict()`` and ``load_state_dict()``, by name.
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
        if name in found:
            raise StateError(f"two tensors of the model have the name {name!r}")
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
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
    # FSDP2 makes a subclass with a name of its own of what it wraps
    hidden = {_WRAPPERS[c.__name__] for c in type(module).__mro__ if c.__name__ in _WRAPPERS}
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, prefix if name in hidden else f"{prefix}{name}.")


def tensors_of(state: State) -> dict[str, LiveTensor]:
    """All tensors of model and optimizer that this rank holds, by logical name."""
    named = named_tensors(state.model)
    found = {f"model.{name}": tensor for name, tensor in named.items()}
    if state.optimizer is not None:
        found.update(optimizer_tensors(state.optimizer, _names(named)))
    return {name: live_tensor(name, tensor) for name, tensor in found.items()}


def objects_of(state: State) -> dict[str, Json]:
    """The named objects as JSON; the same on every rank.

    Raises:
        StateError: something is not plain.
    """
    found = {f"object.{name}": value.state_dict() for name, value in state.objects.items()}
    return {name: to_json(value, name) for name, value in found.items()}


def optimizer_of(state: State) -> dict[str, Json]:
    """The optimizer's groups and plain values as JSON, of the parameters that this rank holds.

    Raises:
        StateError: something is not plain.
    """
    if state.optimizer is None:
        return {}
    values = optimizer_values(state.optimizer, _names(named_tensors(state.model)))
    return {"optimizer": to_json(values, "optimizer")}


def materialise_optimizer(state: State, stored: Mapping[str, TensorSpec]) -> None:
    """Give the optimizer exactly the state tensors that a checkpoint holds, to be loaded into."""
    if state.optimizer is not None:
        materialise(state.optimizer, _names(named_tensors(state.model)), stored)


def load_objects(state: State, stored: Mapping[str, Json], where: str) -> None:
    """Inverse of ``objects_of`` and ``optimizer_of``.

    Raises:
        StateMismatchError: the checkpoint has other objects or other optimizer groups.
        ManifestError: an object in it is not what these make.
    """
    wanted = {f"object.{name}" for name in state.objects}
    wanted |= {"optimizer"} if state.optimizer is not None else set()
    differences = [f"{n!r} is not in the checkpoint" for n in sorted(wanted - stored.keys())]
    differences += [f"its {n!r} is not in this run" for n in sorted(stored.keys() - wanted)]
    if differences:
        raise StateMismatchError(where, differences)
    try:
        values = {name: from_json(value) for name, value in stored.items()}
    except (TypeError, ValueError) as e:
        raise ManifestError(where, f"its objects cannot be decoded: {e}") from None
    if state.optimizer is not None:
        names = _names(named_tensors(state.model))
        load_values(state.optimizer, names, values["optimizer"], where)
    for name, value in state.objects.items():
        value.load_state_dict(values[f"object.{name}"])


def _names(named: Mapping[str, torch.Tensor]) -> dict[torch.Tensor, str]:
    return {tensor: name for name, tensor in named.items()}
