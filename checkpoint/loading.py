"""Loading a checkpoint into a live state: all ranks do, or none can use the state."""

from collections.abc import Callable, Sequence

import torch

from everstep.checkpoint.collective import Collective, Outcome, agree
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.manifest import Manifest
from everstep.checkpoint.snapshots.restore import Source
from everstep.checkpoint.state_capture import Place
from everstep.checkpoint.torch_layout import LiveTensor, live_tensor
from everstep.checkpoint.torch_load import (
    Selection,
    fill_together,
    prepare_load,
    tensors_to_fill,
)
from everstep.checkpoint.torch_rng import derive_rng, set_rng_states
from everstep.checkpoint.torch_state import State, load_objects, object_destinations


class Loading:
    """Fills live states; every rank makes the same calls.

    Args:
        collective: the ranks.
        place: of this rank.
        seed: from which generators are derived on another mesh.
        threads: copy threads of this rank.
    """

    def __init__(self, collective: Collective, place: Place, *, seed: int, threads: int) -> None:
        self._collective, self._place, self._seed = collective, place, seed
        self._threads = threads

    def load(
        self,
        step_id: StepId,
        source: Source,
        state: State,
        wanted: Selection,
        on_bytes: Callable[[int], None] | None,
    ) -> Outcome:
        """Fill a state; each rank's result: the size of the checkpoint in bytes, and whether its
        generators were restored."""
        stored: list[Manifest] = []
        live: dict[str, LiveTensor] = {}

        def prepare() -> str:
            stored.append(source.manifest())
            found, marks = prepare_load(stored[0], state, wanted)
            live.update(found)
            return marks

        prepared = agree(self._collective, "prepared", prepare)
        if prepared.causes:
            return prepared
        return self._fill(
            step_id, source, stored[0], state, live, prepared.results, wanted, on_bytes
        )

    def _fill(
        self,
        step_id: StepId,
        source: Source,
        manifest: Manifest,
        state: State,
        live: dict[str, LiveTensor],
        marks: Sequence[str],
        wanted: Selection,
        on_bytes: Callable[[int], None] | None,
    ) -> Outcome:
        rng: dict[str, LiveTensor] = {}
        fresh: dict[str, torch.Tensor] = {}
        mine, objects = wanted.state(state), wanted.objects(manifest)

        def tensors() -> list[LiveTensor]:
            specs = {n: t.spec for n, t in manifest.tensors.items()}
            generators = self._place.rng() if "rng" in wanted.kinds else {}
            if dict(manifest.mesh) == self._place.mesh and all(
                t.fragment.spec == specs.get(t.fragment.spec.name) for t in generators.values()
            ):
                rng.update(generators)
            fresh.update(object_destinations(mine, objects, specs, source.where))
            found = tensors_to_fill(live, manifest, wanted=wanted, marks=marks, where=source.where)
            of_objects = [live_tensor(name, tensor) for name, tensor in fresh.items()]
            return [*found, *of_objects, *rng.values()]

        def finish() -> tuple[int, bool]:
            load_objects(mine, objects, source.where, fresh)
            if rng:
                set_rng_states({name: t.local for name, t in rng.items()})
            elif "rng" in wanted.kinds:
                derive_rng(self._seed, step_id.step, self._place.name)
            return manifest.size_bytes, bool(rng)

        with source.reader(manifest, self._threads) as reader:
            return fill_together(self._collective, reader, tensors, finish, on_bytes)
