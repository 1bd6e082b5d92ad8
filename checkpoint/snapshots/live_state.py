"""A live state that is looked at after every step: found once, then only checked (torch).

Its tensors are of two kinds. What only optimizers change is copied *late*, while the next step
computes, until a fence. Everything else is copied *at once*, when a step is saved: buffers, which
forward passes change; tensors in objects; generators; parameters that no optimizer of the state
updates although they want gradients, and embeddings that renormalise themselves in forward.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from everstep.checkpoint.errors import LayoutError, StateError
from everstep.checkpoint.layout import Fragment
from everstep.checkpoint.plain_json import Json, to_json
from everstep.checkpoint.snapshots.watch import Watch, local_of
from everstep.checkpoint.state_capture import Place, held
from everstep.checkpoint.torch_layout import LiveTensor
from everstep.checkpoint.torch_optimizer import group_values
from everstep.checkpoint.torch_state import State, optimizer_of, split_objects, tensors_of


class Look(NamedTuple):
    """What has to be taken at the moment of a save."""

    moving: dict[Fragment, LiveTensor]
    """Tensors in objects, and generators: other ones at each save."""
    context: dict[str, Any]
    """What the part says beside its fragments."""


class LiveState:
    """The tensors of a state, as this rank holds them.

    Args:
        state: the state.
        place: of this rank.
        lazy_objects: names of objects whose tensors change only after ``wait_captured``: they are
            copied late.

    Raises:
        StateError: something cannot be saved.
        LayoutError: the layout or dtype of a tensor cannot be saved.
    """

    def __init__(self, state: State, place: Place, lazy_objects: Collection[str] = ()) -> None:
        _refuse_foreign_updates(state)
        self._place = place
        self._objects = tuple(state.objects)
        self._lazy_prefixes = tuple(f"object.{name}." for name in lazy_objects)
        objects, of_objects = split_objects(state)
        self.fixed: dict[Fragment, LiveTensor] = held(tensors_of(state).values())
        """Tensors of model and optimizers."""
        self.found = 1
        """How often they were looked for: with each time they may be elsewhere."""
        moving = held([*of_objects.values(), *place.rng().values()])
        self._moving = frozenset(moving)
        optimizer = optimizer_of(state)
        self.first = Look(moving, place.context(objects, optimizer))
        """What ``look`` would have said when the state was found."""
        self._held_names = _held_names(optimizer)
        self._only_groups = _only_groups(optimizer)
        self._remember(state)

    def _remember(self, state: State) -> None:
        self._optimizers = state.optimizers
        self._late = _late_tensors(state)
        self._watch = Watch(state)

    @property
    def fragments(self) -> list[Fragment]:
        """All that this rank holds."""
        return [*self.fixed, *self._moving]

    def look(self, state: State) -> Look | None:
        """What is to be taken now; None where the state is no longer laid out as it was found.

        Tensors that were replaced by others of the same layout are found again: it takes
        milliseconds.

        Raises:
            StateError: an object holds what cannot be saved.
        """
        if tuple(state.objects) != self._objects:
            return None
        if not self._watch.unchanged(state) and not self._found_again(state):
            return None
        objects, of_objects = split_objects(state)
        moving = held([*of_objects.values(), *self._place.rng().values()])
        if moving.keys() != self._moving:
            return None
        return Look(moving, self._place.context(objects, self._optimizer(state)))

    def _found_again(self, state: State) -> bool:
        """Whether the state has the same layout, its tensors being others."""
        try:
            _refuse_foreign_updates(state)
            fixed, optimizer = held(tensors_of(state).values()), optimizer_of(state)
        except (StateError, LayoutError):
            return False  # who makes a new plan gets the error, and tells the other ranks
        if fixed.keys() != self.fixed.keys() or _held_names(optimizer) != self._held_names:
            return False
        self.fixed, self._only_groups = fixed, _only_groups(optimizer)
        self.found += 1
        self._remember(state)
        return True

    def is_late(self, fragment: Fragment, tensor: LiveTensor) -> bool:
        """Whether a tensor stays as it is until the fence."""
        if fragment in self.fixed:
            return tensor.local.data_ptr() in self._late
        return fragment.spec.name.startswith(self._lazy_prefixes) if self._lazy_prefixes else False

    def probes(
        self, fragments: Collection[Fragment]
    ) -> list[tuple[torch.optim.Optimizer, Fragment]]:
        """For each optimizer one of these fragments that it updates, if there is one."""
        where = {
            tensor.local.data_ptr(): fragment
            for fragment in fragments
            if fragment.size_bytes and (tensor := self.fixed.get(fragment)) is not None
        }
        found = []
        for optimizer in self._optimizers:
            updated = (p for group in optimizer.param_groups for p in group["params"])
            of_it = (where.get(local_of(p).data_ptr()) for p in updated if p.requires_grad)
            if (first := next((f for f in of_it if f is not None), None)) is not None:
                found.append((optimizer, first))
        return found

    def _optimizer(self, state: State) -> Mapping[str, Json]:
        if not self._only_groups:
            return optimizer_of(state)
        groups = group_values(state.optimizers, self._held_names)
        names = [group.pop("params") for group in groups]  # lists of text are JSON already
        coded = to_json(groups, "optimizer.groups")
        assert isinstance(coded, list)
        for group, held_names in zip(coded, names, strict=True):
            assert isinstance(group, dict)
            group["params"] = held_names
        return {"optimizer": {"groups": coded, "values": {}}}


def _held_names(optimizer: Mapping[str, Any]) -> list[list[str]]:
    """The names of the parameters of each group."""
    values = optimizer.get("optimizer")
    return [] if values is None else [group["params"] for group in values["groups"]]


def _only_groups(optimizer: Mapping[str, Any]) -> bool:
    """Whether there are optimizers, whose states hold tensors only."""
    values = optimizer.get("optimizer")
    return values is not None and not values["values"]


def _late_tensors(state: State) -> set[int]:
    """Addresses of the tensors that nothing but a step of an optimizer of the state changes."""
    if not state.optimizers:  # then every save waits for its copies, unless told otherwise
        return {local_of(parameter).data_ptr() for parameter in state.model.parameters()}
    updated = {
        id(parameter)
        for optimizer in state.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    renormalised = {
        id(module.weight)
        for module in state.model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
    }
    late: list[torch.Tensor] = [
        parameter
        for parameter in state.model.parameters()
        if (id(parameter) in updated or not parameter.requires_grad)
        and id(parameter) not in renormalised
    ]
    late += [
        value
        for optimizer in state.optimizers
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, torch.Tensor)
    ]
    changed_in_forward = {local_of(buffer).data_ptr() for buffer in state.model.buffers()}
    return {local_of(tensor).data_ptr() for tensor in late} - changed_in_forward


def _refuse_foreign_updates(state: State) -> None:
    """Optimizers that step inside of backward are fenced only when the state knows them."""
    known = {id(optimizer) for optimizer in state.optimizers}
    for name, parameter in state.model.named_parameters():
        inside: Iterable[Any] = getattr(parameter, "_in_backward_optimizers", ())
        if any(id(optimizer) not in known for optimizer in inside):
            raise StateError(
                f"parameter {name!r} is updated inside of backward by an optimizer that the State "
                "does not have: give all of them, State(optimizer=[...])"
            )
