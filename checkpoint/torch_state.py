"""Live torch state <-> logical tensors and JSON-able objects.

Logical names are ``model.<parameter>`` and ``optimizer.<parameter>.<state>``: the same with and
without DDP, ``torch.compile``, FSDP2 and activation-checkpointing wrappers, in any nesting.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from everstep.checkpoint.errors import ManifestError, StateError, StateMismatchError
from everstep.checkpoint.layout import TensorSpec
from everstep.checkpoint.plain_json import Json, from_json, not_plain, to_json
from everstep.checkpoint.torch_layout import DTYPES, LiveTensor, live_tensors
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
    "DataParallel": "module",
}
"""Class name of a wrapper -> name of its only child; the child's name is left out."""


AnyOptimizer = (
    torch.optim.Optimizer
    | Sequence[torch.optim.Optimizer]
    | Mapping[str, torch.optim.Optimizer]
    | None
)


@runtime_checkable
class Stateful(Protocol):
    """Anything with a plain state: scheduler, data stream, the user's own objects."""

    def state_dict(self) -> dict[str, Any]:
        """The state, the same on every rank: None, numbers, text, lists, tuples and mappings.

        Tensors may be anywhere among them; DTensors are saved by shard. All ranks are asked for
        these, rank 0 for the rest.
        """
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take a state over, on every rank; the tensors in it are new ones."""
        ...


class State:
    """The live state of a run; names what a checkpoint holds.

    Args:
        model: parameters and persistent buffers are saved; DTensors are saved by shard.
        optimizer: over parameters of ``model``; or several, as a sequence or mapping, none of them
            over a parameter of another.
        objects: anything with a plain ``state_dict()`` and ``load_state_dict()``, by name.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: AnyOptimizer = None,
        **objects: Stateful,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise StateError(
                f"State(model=...): got {type(model).__name__}, expected the nn.Module itself, "
                "which is saved and filled in place"
            )
        for name, value in objects.items():
            if not isinstance(value, Stateful):
                raise StateError(
                    f"State({name}=...): {type(value).__name__} has no state_dict and "
                    "load_state_dict: give an object that has both"
                )
        self.model, self.optimizer, self.objects = model, optimizer, objects

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimizers, in the order in which they were given."""
        match self.optimizer:
            case None:
                return ()
            case torch.optim.Optimizer():
                return (self.optimizer,)
            case Mapping():
                return tuple(self.optimizer.values())
        return tuple(self.optimizer)


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
    classes = {c.__name__ for c in type(module).__mro__}
    if "FullyShardedDataParallel" in classes:
        raise StateError(
            f"module {prefix[:-1] or type(module).__name__!r} is wrapped in "
            "FullyShardedDataParallel, whose shards do not say what they are: use fully_shard"
        )
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
    hidden = {_WRAPPERS[name] for name in classes & _WRAPPERS.keys()}
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, prefix if name in hidden else f"{prefix}{name}.")


def tensors_of(state: State) -> dict[str, LiveTensor]:
    """All tensors of model and optimizer that this rank holds, by logical name."""
    named = named_tensors(state.model)
    found = {f"model.{name}": tensor for name, tensor in named.items()}
    found.update(optimizer_tensors(state.optimizers, _names(named)))
    return live_tensors(found)


def split_objects(state: State) -> tuple[dict[str, Json], dict[str, LiveTensor]]:
    """The named objects as JSON, and the tensors in them as ``object.<name>.<path>``.

    Every object is asked once, so that both are of one moment; the same on every rank.

    Raises:
        StateError: something is not plain.
        LayoutError: the layout or dtype of a tensor cannot be saved.
    """
    found, tensors = _split_objects(state)
    return found, live_tensors(tensors)


def object_destinations(
    state: State, stored: Mapping[str, Json], specs: Mapping[str, TensorSpec], where: str
) -> dict[str, torch.Tensor]:
    """New tensors for those that the stored objects hold, by logical name, to be loaded into.

    Laid out as those that the live objects have now, where they have one of the name, dtype and
    shape; else plain, on the CPU.

    Args:
        state: the state to load into.
        stored: the objects of the checkpoint.
        specs: the tensors of the checkpoint.
        where: its path.

    Raises:
        ManifestError: an object names a tensor that there is not.
    """
    names: set[str] = set()
    for name in state.objects:
        if f"object.{name}" in stored:
            _from_json(stored[f"object.{name}"], where, names.add)
    live = _split_objects(state)[1] if names else {}
    made = {}
    for name in sorted(names):
        if name not in specs:
            raise ManifestError(where, f"its objects name a tensor {name!r} that it does not have")
        spec, like = specs[name], live.get(name)
        dtype = DTYPES[spec.dtype]
        fits = like is not None and like.dtype == dtype and tuple(like.shape) == spec.shape
        made[name] = (
            torch.empty_like(like, requires_grad=False, memory_format=torch.contiguous_format)
            if like is not None and fits
            else torch.empty(spec.shape, dtype=dtype)
        )
    return made


def _split_objects(state: State) -> tuple[dict[str, Json], dict[str, torch.Tensor]]:
    tensors: dict[str, torch.Tensor] = {}

    def keep(value: Any, name: str) -> Json:
        if not isinstance(value, torch.Tensor):
            raise not_plain(value, name)
        if name in tensors:
            raise StateError(f"two tensors in the state of an object have the name {name!r}")
        tensors[name] = value
        return {"$tensor": name}

    found = {
        f"object.{name}": to_json(value.state_dict(), f"object.{name}", keep)
        for name, value in state.objects.items()
    }
    return found, tensors


def _from_json(value: Json, where: str, tensor: Callable[[str], Any]) -> Any:
    try:
        return from_json(value, tensor)
    except (TypeError, ValueError, RecursionError) as e:
        raise ManifestError(where, f"its objects cannot be decoded: {e}") from None


def optimizer_of(state: State) -> dict[str, Json]:
    """The optimizer's groups and plain values as JSON, of the parameters that this rank holds.

    Raises:
        StateError: something is not plain.
    """
    if not state.optimizers:
        return {}
    values = optimizer_values(state.optimizers, _names(named_tensors(state.model)))
    return {"optimizer": to_json(values, "optimizer")}


def materialise_optimizer(state: State, stored: Mapping[str, TensorSpec]) -> None:
    """Give the optimizer exactly the state tensors that a checkpoint holds, to be loaded into."""
    if state.optimizers:
        materialise(state.optimizers, _names(named_tensors(state.model)), stored)


def load_objects(
    state: State,
    stored: Mapping[str, Json],
    where: str,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Inverse of ``split_objects`` and ``optimizer_of``.

    Args:
        state: the state to load into.
        stored: the objects of the checkpoint.
        where: its path.
        tensors: ``object_destinations``, filled.

    Raises:
        StateMismatchError: the checkpoint has other objects or other optimizer groups.
        ManifestError: an object in it is not what these make.
    """
    wanted = {f"object.{name}" for name in state.objects}
    wanted |= {"optimizer"} if state.optimizers else set()
    differences = [f"{n!r} is not in the checkpoint" for n in sorted(wanted - stored.keys())]
    differences += [f"its {n!r} is not in this run" for n in sorted(stored.keys() - wanted)]
    if differences:
        raise StateMismatchError(where, differences)
    filled = tensors or {}

    def tensor(name: str) -> torch.Tensor:
        if name not in filled:
            raise ValueError(f"there is no tensor {name!r}")
        return filled[name]

    values = {name: _from_json(value, where, tensor) for name, value in stored.items()}
    if state.optimizers:
        names = _names(named_tensors(state.model))
        load_values(state.optimizers, names, values["optimizer"], where)
    for name, value in state.objects.items():
        value.load_state_dict(values[f"object.{name}"])


def _names(named: Mapping[str, torch.Tensor]) -> dict[torch.Tensor, str]:
    return {tensor: name for name, tensor in named.items()}
