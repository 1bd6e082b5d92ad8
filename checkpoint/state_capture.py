"""Everything of a live state that a checkpoint of one rank holds, as fragments and as JSON."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from everstep.checkpoint.layout import RNG_PREFIX, Fragment
from everstep.checkpoint.plain_json import Json
from everstep.checkpoint.producer import producer
from everstep.checkpoint.torch_layout import LiveTensor, live_tensor
from everstep.checkpoint.torch_rng import rng_states
from everstep.checkpoint.torch_state import State, optimizer_of, split_objects, tensors_of


class Place:
    """Where a rank is on the mesh of its run.

    Args:
        rank: its number.
        mesh: size of each mesh axis.
        coordinate: the rank's index on each axis.
    """

    def __init__(self, rank: int, mesh: Mapping[str, int], coordinate: Mapping[str, int]) -> None:
        self.rank, self.mesh = rank, dict(mesh)
        self.name = ".".join(f"{axis}{index}" for axis, index in coordinate.items())

    def rng(self) -> dict[str, LiveTensor]:
        """The states of this rank's random generators."""
        return {
            name: live_tensor(f"{RNG_PREFIX}{self.name}.{name}", value)
            for name, value in rng_states().items()
        }

    def context(self, objects: Mapping[str, Json], optimizer: Mapping[str, Json]) -> dict[str, Any]:
        """What the part of this rank says beside its fragments, but for its lineage."""
        if self.rank != 0:
            return dict(optimizer)
        versions = producer(torch=torch.__version__)
        return {"mesh": self.mesh, "producer": versions, "objects": dict(objects), **optimizer}


def capture(state: State, place: Place) -> tuple[dict[Fragment, LiveTensor], dict[str, Any]]:
    """What this rank holds, and the context of its part.

    Raises:
        StateError: something cannot be saved.
        LayoutError: the layout or dtype of a tensor cannot be saved.
    """
    objects, of_objects = split_objects(state)
    found = [*tensors_of(state).values(), *of_objects.values(), *place.rng().values()]
    return held(found), place.context(objects, optimizer_of(state))


def held(tensors: Iterable[LiveTensor]) -> dict[Fragment, LiveTensor]:
    """By fragment; an empty shard of a tensor is nothing, an empty tensor is."""
    return {t.fragment: t for t in tensors if t.fragment.box.size or not t.fragment.spec.size_bytes}
