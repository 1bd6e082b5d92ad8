"""Loading: which parts of a checkpoint are wanted, and how they get into the live state."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from everstep.checkpoint.errors import StateMismatchError
from everstep.checkpoint.layout import TensorSpec
from everstep.checkpoint.manifest import Manifest
from everstep.checkpoint.reshard import held_nowhere, layout_differences, mark_held
from everstep.checkpoint.step_reader import StepReader
from everstep.checkpoint.torch_io import fill_tensors
from everstep.checkpoint.torch_layout import LiveTensor
from everstep.checkpoint.torch_state import State, load_objects, materialise_optimizer, tensors_of

KINDS = ("model", "optimizer", "objects", "rng")
RNG_PREFIX = "rng."


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

    def objects(self, manifest: Manifest) -> dict[str, object]:
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


def prepare_load(manifest: Manifest, state: State, wanted: Selection) -> str:
    """Makes the optimizer's tensors; says which of the stored ones this rank holds."""
    specs = wanted.specs(manifest)
    if "optimizer" in wanted.kinds:
        materialise_optimizer(state, specs)
    return mark_held(wanted.tensors(state), specs)


def load_into(
    state: State,
    manifest: Manifest,
    reader: StepReader,
    *,
    wanted: Selection,
    marks: Sequence[str],
    rng: Mapping[str, LiveTensor],
    where: str,
    on_bytes: Callable[[int], None] | None,
) -> None:
    """Fill the wanted parts of a live state, and the generators' states ``rng``.

    Raises:
        StateMismatchError: the checkpoint does not hold what this run has.
        DamagedError: a pack is not what the manifest says.
    """
    specs, live = wanted.specs(manifest), wanted.tensors(state)
    needed = held_nowhere(specs, marks) | live.keys()  # the others are another rank's
    differences = layout_differences(
        {n: (t.fragment.spec.dtype, t.fragment.spec.shape) for n, t in live.items()},
        {n: (s.dtype, s.shape) for n, s in specs.items() if n in needed},
    )
    if differences:
        raise StateMismatchError(where, differences)
    load_objects(wanted.state(state), wanted.objects(manifest), where)  # type: ignore[arg-type]
    fill_tensors([*live.values(), *rng.values()], reader, on_bytes=on_bytes)
