"""Whether the tensors of a live state are still the same objects in the same memory (torch)."""

from collections.abc import Iterator, Mapping, Sized
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from everstep.checkpoint.torch_state import State


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds, without telling autograd."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


class Watch:
    """Remembers where every tensor of a model and its optimizers is.

    Looking takes microseconds per tensor, where describing them anew takes milliseconds in all: a
    snapshot of every step can afford the one only.
    """

    def __init__(self, state: State) -> None:
        self._model, self._optimizers = state.model, state.optimizers
        self._sharded = [m for m in state.model.modules() if isinstance(m, FSDPModule)]
        self._sizes: list[tuple[Sized, int]] = []
        self._members: list[tuple[Mapping[Any, Any], Any, object]] = []
        """Members of mappings that are to stay the same objects."""
        self._tensors: list[tuple[Mapping[Any, Any], Any, torch.Tensor, int]] = []
        for container in _containers(state):
            self._sizes.append((container, len(container)))
            for key, value in container.items():
                if isinstance(value, torch.Tensor):
                    place = local_of(value).data_ptr()
                    self._tensors.append((container, key, value, place))
                elif isinstance(value, nn.Module | dict):
                    self._members.append((container, key, value))
        for module in state.model.modules():
            hidden = module._non_persistent_buffers_set
            self._sizes.append((hidden, len(hidden)))
        self._states = [(o, o.state, o.param_groups) for o in self._optimizers]
        self._groups = [list(group["params"]) for o in self._optimizers for group in o.param_groups]

    def unchanged(self, state: State) -> bool:
        """Whether all tensors are where they were, and there are no others."""
        optimizers = state.optimizers
        if state.model is not self._model or not _same(optimizers, self._optimizers):
            return False
        for module in self._sharded:
            module.reshard()  # an evaluation leaves the root's parameters gathered
        if any(o.state is not s or o.param_groups is not g for o, s, g in self._states):
            return False
        groups = [group["params"] for o in optimizers for group in o.param_groups]
        if len(groups) != len(self._groups):
            return False
        if not all(_same(now, then) for now, then in zip(groups, self._groups, strict=True)):
            return False
        if any(len(container) != size for container, size in self._sizes):
            return False
        if any(container.get(key) is not member for container, key, member in self._members):
            return False
        return all(
            container.get(key) is tensor and local_of(tensor).data_ptr() == place
            for container, key, tensor, place in self._tensors
        )


def _same(now: Any, then: Any) -> bool:
    """Whether two sequences have the same objects."""
    return len(now) == len(then) and all(a is b for a, b in zip(now, then, strict=True))


def _containers(state: State) -> Iterator[Mapping[Any, Any]]:
    """Every mapping that tensors of the state, or what has such, can come and go in."""
    for module in state.model.modules():
        yield from (module._parameters, module._buffers, module._modules)
    for optimizer in state.optimizers:
        yield optimizer.state
        yield from optimizer.state.values()
