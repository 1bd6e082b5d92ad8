"""Loading: which parts of a checkpoint are wanted, and how they get into the live state."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from everstep.checkpoint.collective import Collective, Outcome, agree
from everstep.checkpoint.errors import StateMismatchError
from everstep.checkpoint.layout import TensorSpec
from everstep.checkpoint.manifest import Manifest
from everstep.checkpoint.reshard import held_nowhere, layout_differences, mark_held
from everstep.checkpoint.shared_read import Peers, SharedRead
from everstep.checkpoint.step_reader import StepReader
from everstep.checkpoint.torch_io import fill_tensors, host_requests
from everstep.checkpoint.torch_layout import LiveTensor
from everstep.checkpoint.torch_state import State, materialise_optimizer, tensors_of

KINDS = ("model", "optimizer", "objects", "rng")


@dataclass(frozen=True)
class Selection:
    """Which kinds of state to load; see ``KINDS``."""

    kinds: frozenset[str]

    def specs(self, manifest: Manifest) -> dict[str, TensorSpec]:
        """The stored tensors of model and optimizer that are wanted."""
        return {n: t.spec for n, t in manifest.tensors.items() if n.split(".")[0] in self._tensors}

    def state(self, state: State) -> State:
        """The part of a live state that is wanted (the model is always there, for its names)."""
        optimizer = state.optimizer if "optimizer" in self.kinds else None
        objects = state.objects if "objects" in self.kinds else {}
        return State(model=state.model, optimizer=optimizer, **objects)

    def tensors(self, state: State) -> dict[str, LiveTensor]:
        """The live tensors of model and optimizer that are wanted."""
        found = tensors_of(self.state(state)).items()
        return {n: t for n, t in found if n.split(".")[0] in self._tensors}

    def objects(self, manifest: Manifest) -> dict[str, Any]:
        """The stored objects that are wanted."""
        return {
            name: value
            for name, value in manifest.objects.items()
            if ("optimizer" if name == "optimizer" else "objects") in self.kinds
        }

    @property
    def _tensors(self) -> frozenset[str]:
        return self.kinds & {"model", "optimizer"}


def selection(include: Iterable[str] | None) -> Selection:
    """What ``load(include=...)`` asks for; None: everything.

    Raises:
        ValueError: it names something else, or nothing.
    """
    kinds = frozenset(KINDS if include is None else include)
    if isinstance(include, str) or not kinds or kinds - set(KINDS):
        raise ValueError(f"include={include!r}: expected a list of some of {', '.join(KINDS)}")
    return Selection(kinds)


def prepare_load(
    manifest: Manifest, state: State, wanted: Selection
) -> tuple[dict[str, LiveTensor], str]:
    """Makes the optimizer's tensors; the wanted ones, and which of the stored ones they are."""
    specs = wanted.specs(manifest)
    if "optimizer" in wanted.kinds:
        materialise_optimizer(state, specs)
    live = wanted.tensors(state)
    return live, mark_held(live, specs)


def tensors_to_fill(
    live: Mapping[str, LiveTensor],
    manifest: Manifest,
    *,
    wanted: Selection,
    marks: Sequence[str],
    where: str,
) -> list[LiveTensor]:
    """The tensors of model and optimizer that are to be filled.

    Raises:
        StateMismatchError: the checkpoint does not hold what this run has.
    """
    specs = wanted.specs(manifest)
    needed = held_nowhere(specs, marks) | live.keys()  # the others are another rank's
    differences = layout_differences(
        {n: (t.fragment.spec.dtype, t.fragment.spec.shape) for n, t in live.items()},
        {n: (s.dtype, s.shape) for n, s in specs.items() if n in needed},
    )
    if differences:
        raise StateMismatchError(where, differences)
    return list(live.values())


def fill_together(
    collective: Collective,
    reader: StepReader,
    tensors: Callable[[], list[LiveTensor]],
    finish: Callable[[], Any],
    on_bytes: Callable[[int], None] | None,
) -> Outcome:
    """Fill tensors on every rank; the outcome has what ``finish`` returned there.

    From an object store each byte is fetched once and sent to all ranks that need it, where ranks
    can send and their tensors are on the host; else every rank fetches its own.

    Args:
        collective: the ranks.
        reader: of the checkpoint.
        tensors: says what to fill; its errors are causes, too.
        finish: called when the tensors are filled; JSON-able.
        on_bytes: called with the bytes filled so far.
    """
    live: list[LiveTensor] = []
    shared: list[SharedRead] = []

    def alone() -> Any:
        fill_tensors(live or tensors(), reader, on_bytes=on_bytes)
        return finish()

    if reader.ranged is None or collective.world_size == 1 or not isinstance(collective, Peers):
        return agree(collective, "loaded", alone)
    ranged, peers = reader.ranged, collective

    def plan() -> dict[str, str] | None:
        live.extend(tensors())
        if any(t.local.device.type != "cpu" for t in live):
            return None
        shared.append(SharedRead(ranged, peers, host_requests(live)))
        return shared[0].needs()

    planned = agree(collective, "planned", plan)
    if planned.causes:
        return planned
    if None in planned.results:
        return agree(collective, "loaded", alone)
    opened = agree(collective, "opened", lambda: shared[0].open(planned.results))
    if opened.causes:
        return opened

    def fill() -> Any:
        with torch.no_grad():
            shared[0].fill(opened.results, on_bytes)
        return finish()

    return agree(collective, "loaded", fill)
