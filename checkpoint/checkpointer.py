"""The face of checkpointing: save and load a live torch state in a local directory."""

import contextlib
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from everstep.checkpoint.collective import Collective, SingleProcess, agree, describe, on_rank0
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.errors import (
    CheckpointError,
    LoadFailedError,
    SaveFailedError,
    StateMismatchError,
    StepExistsError,
)
from everstep.checkpoint.layout import Fragment, TensorSpec
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.lock import DirectoryLock
from everstep.checkpoint.manifest import Manifest, Part
from everstep.checkpoint.optimizer_parts import digest_values
from everstep.checkpoint.reshard import held_nowhere, layout_differences, mark_held
from everstep.checkpoint.save_plan import SavePlan
from everstep.checkpoint.torch_io import fill_tensors, write_tensors
from everstep.checkpoint.torch_layout import LiveTensor, live_tensor
from everstep.checkpoint.torch_rng import derive_rng, rng_states, set_rng_states
from everstep.checkpoint.torch_state import (
    State,
    load_objects,
    materialise_optimizer,
    object_destinations,
    object_tensors,
    objects_of,
    optimizer_of,
    tensors_of,
)

RNG_PREFIX = "rng."
OBJECT_PREFIX = "object."


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """A checkpoint that was saved or loaded."""

    step: int
    generation: int
    path: str
    size_bytes: int
    duration_s: float
    rng_restored: bool = True
    """False after a load on another mesh: generators were derived from (seed, step, rank)."""


class Checkpointer:
    """Saves and loads the state of a run; every rank makes the same calls in the same order.

    Args:
        directory: where checkpoints live; made when first written to.
        keep: how many of the newest checkpoints to keep; at least 1.
        collective: how ranks agree; None for a single process.
        mesh: size of each mesh axis; None: one axis over all ranks.
        coordinate: this rank's index on each axis of ``mesh``; no two ranks have the same.
        seed: from which random generators are derived when loading on another mesh.
        threads: copy threads of this rank.
        read_only: take no lock, refuse to save.

    A context manager; ``close()`` releases the directory.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 3,
        collective: Collective | None = None,
        mesh: Mapping[str, int] | None = None,
        coordinate: Mapping[str, int] | None = None,
        seed: int = 0,
        threads: int = 1,
        read_only: bool = False,
    ) -> None:
        self._collective = collective or SingleProcess()
        self._mesh = dict(mesh or {"rank": self._collective.world_size})
        place = dict(coordinate or {"rank": self._collective.rank})
        if keep < 1:
            raise ValueError(f"keep={keep}: at least the newest checkpoint is kept")
        if self._mesh.keys() != place.keys() or (
            math.prod(self._mesh.values()) != self._collective.world_size
        ):
            raise ValueError(
                f"mesh {self._mesh} and coordinate {place} do not name one place for each of "
                f"{self._collective.world_size} ranks"
            )
        self._directory = CheckpointDirectory(Path(directory))
        self._keep, self._seed, self._threads, self._read_only = keep, seed, threads, read_only
        self._coordinate = ".".join(f"{axis}{index}" for axis, index in place.items())
        self._attempt = os.urandom(4).hex()
        self.loaded: StepInfo | None = None
        """What the last load took; None before one."""
        self._lock: DirectoryLock | None = None
        self._claimed = False
        self._parent: StepId | None = None
        self._generation: int | None = None
        self._newest_step = -1
        self._plan = SavePlan(self._collective)

    def save(
        self, step: int, state: State, *, on_bytes: Callable[[int], None] | None = None
    ) -> StepInfo:
        """Save the state after a step; when it returns, the checkpoint is durable.

        Args:
            step: number of the step that has just been finished, from 0; larger from save to save.
            state: what to save.
            on_bytes: called on each rank with the bytes written so far.

        Raises:
            SaveFailedError: some rank could not save; causes by rank, nothing of the step is kept.
            StepExistsError: this step was saved already.
            DirectoryInUseError: another job writes to the directory.
            CheckpointError: the step lies before one that was saved, or the directory cannot be
                written to.
        """
        begun_s = time.monotonic()
        self._check_step(step)
        self._claim()
        live: dict[Fragment, LiveTensor] = {}
        context: dict[str, Any] = {}

        def capture() -> list[str]:
            live.update(self._capture(state))
            context.update(self._context(state))
            return [self._plan.digest(list(live)), digest_values(context.get("optimizer"))]

        captured = agree(self._collective, "captured", capture)
        if captured.causes:
            raise SaveFailedError(step, captured.causes) from captured.error
        layouts, optimizers = zip(*captured.results, strict=True)
        self._plan.update(layouts)
        if optimizers.index(optimizers[self._collective.rank]) != self._collective.rank:
            context.pop("optimizer", None)  # an earlier rank tells the same
        step_id = StepId(self._begin_generation(step), step)
        done = agree(
            self._collective, "written", lambda: self._write(step_id, live, context, on_bytes)
        )
        if not done.causes:
            done = agree(self._collective, "committed", lambda: self._commit(step_id))
        if done.causes:
            self._discard(step_id)
            raise SaveFailedError(step, done.causes) from done.error
        self._newest_step = step
        return StepInfo(
            step=step,
            generation=step_id.generation,
            path=str(self._directory.step_path(step_id)),
            size_bytes=done.results[0],
            duration_s=time.monotonic() - begun_s,
        )

    def load(self, state: State, step: int | None = None) -> int:
        """Load a checkpoint into a live state, on any number of data-parallel ranks.

        Args:
            state: filled in place; after an error it is not to be used.
            step: which one; None: the newest.

        Returns:
            The next step to run: one more than the one loaded, 0 when nothing was saved yet.
            ``loaded`` tells the details.

        Raises:
            StepNotFoundError: ``step`` was not saved, or is outside the lineage.
            LoadFailedError: some rank found damage, or state that does not fit; causes by rank.
            DirectoryInUseError: another job writes to the directory.
        """
        begun_s = time.monotonic()
        self._claim()
        found, steps = on_rank0(
            self._collective, "find", lambda: (self._directory.find(step), self.steps())
        )
        if found is None:
            return 0
        step_id = StepId(*found)
        stored: list[Manifest] = []

        def prepare() -> str:
            stored.append(self._directory.manifest(step_id))
            return self._prepare(stored[0], state)

        done = agree(self._collective, "prepared", prepare)
        if not done.causes:
            marks = done.results
            done = agree(
                self._collective, "loaded", lambda: self._read(step_id, stored[0], state, marks)
            )
        if done.causes:
            others = [s for s in steps if s != step_id.step]
            raise LoadFailedError(step_id.step, done.causes, others) from done.error
        size_bytes, rng_restored = done.results[self._collective.rank]
        self._parent, self._generation, self._newest_step = step_id, None, step_id.step
        self.loaded = StepInfo(
            step=step_id.step,
            generation=step_id.generation,
            path=str(self._directory.step_path(step_id)),
            size_bytes=size_bytes,
            duration_s=time.monotonic() - begun_s,
            rng_restored=rng_restored,
        )
        return step_id.step + 1

    def steps(self) -> list[int]:
        """Steps that can be loaded, ascending."""
        return [s.step for s in self._directory.lineage()]

    def latest(self) -> int | None:
        """The newest step that can be loaded."""
        return max(self.steps(), default=None)

    def inspect(self, step: int | None = None) -> Manifest | None:
        """The manifest of a step (None: the newest), without reading any pack."""
        found = self._directory.find(step)
        return None if found is None else self._directory.manifest(found)

    def close(self) -> None:
        """Release the directory; may be called twice."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        self._claimed = False

    def _check_step(self, step: int) -> None:
        if self._read_only:
            raise CheckpointError(f"{self._directory.root} was opened read-only: open it to write")
        if step == self._newest_step and self._generation is not None:
            raise StepExistsError(str(self._directory.step_path(StepId(self._generation, step))))
        if step < self._newest_step or step < 0:
            raise CheckpointError(
                f"step {step} cannot be saved after step {self._newest_step}: steps ascend from 0; "
                "load() an earlier step to continue from there"
            )

    def _claim(self) -> None:
        """Lock the directory and clear away what earlier attempts left half-written."""
        if self._claimed or self._read_only:
            return

        def claim() -> None:
            try:
                self._lock = DirectoryLock(self._directory.root)
                self._directory.check_writable()
                self._directory.collect_garbage()
            except OSError as e:
                self.close()
                raise CheckpointError(
                    f"checkpoints cannot be kept in {self._directory.root}: {describe(e)}"
                ) from e

        on_rank0(self._collective, "claim", claim)
        self._claimed = True

    def _begin_generation(self, step: int) -> int:
        """The number of this attempt; its first save creates the generation."""
        if self._generation is None:
            begun = agree(self._collective, "generation", self._new_generation)
            if begun.causes:
                raise SaveFailedError(step, begun.causes) from begun.error
            self._generation = int(begun.results[0])
        return self._generation

    def _new_generation(self) -> int | None:
        if self._collective.rank != 0:
            return None
        lineage = self._directory.lineage()
        if self._parent is None and lineage:
            raise CheckpointError(
                f"{self._directory.root} holds checkpoints of an earlier run, up to step "
                f"{lineage[-1].step}: load() one to continue from it, or use another directory"
            )
        return self._directory.create_generation(self._parent, self._mesh).number

    def _capture(self, state: State) -> dict[Fragment, LiveTensor]:
        """What this rank holds; an empty shard of a tensor is nothing, an empty tensor is."""
        of_objects = object_tensors(state)
        found = [*tensors_of(state).values(), *of_objects.values(), *self._live_rng().values()]
        return {
            t.fragment: t for t in found if t.fragment.box.size or not t.fragment.spec.size_bytes
        }

    def _live_rng(self) -> dict[str, LiveTensor]:
        return {
            name: live_tensor(f"{RNG_PREFIX}{self._coordinate}.{name}", value)
            for name, value in rng_states().items()
        }

    def _context(self, state: State) -> dict[str, Any]:
        optimizer = optimizer_of(state)
        if self._collective.rank != 0:
            return optimizer
        producer = {
            "everstep": _version(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        objects = objects_of(state)
        return {"mesh": self._mesh, "producer": producer, "objects": objects, **optimizer}

    def _write(
        self,
        step_id: StepId,
        live: Mapping[Fragment, LiveTensor],
        context: dict[str, Any],
        on_bytes: Callable[[int], None] | None,
    ) -> None:
        plan = self._plan.pack()
        path = self._directory.begin_step(step_id)
        name = f"rank-{plan.rank:05d}-{self._attempt}.safetensors"
        record = write_tensors(path / name, plan, live, threads=self._threads, on_bytes=on_bytes)
        self._directory.put_part(
            Part(
                generation=step_id.generation,
                step=step_id.step,
                rank=plan.rank,
                world_size=self._collective.world_size,
                pack=record,
                fragments=plan.fragments,
                context=context,
            )
        )

    def _commit(self, step_id: StepId) -> int | None:
        """Make the step exist, then delete what is no longer kept; on rank 0, the others wait."""
        if self._collective.rank != 0:
            return None
        manifest = self._directory.commit(step_id, self._collective.world_size)
        try:
            self._directory.retire(self._keep, step_id.generation)
        except (OSError, CheckpointError) as e:
            warnings.warn(
                f"step {step_id.step} is saved, but older checkpoints could not be deleted: "
                f"{describe(e)}",
                RuntimeWarning,
                stacklevel=4,
            )
        return manifest.size_bytes

    def _discard(self, step_id: StepId) -> None:
        """Delete a failed save; what cannot be deleted now, the next attempt clears away."""
        if self._collective.rank == 0:
            with contextlib.suppress(OSError):
                self._directory.delete(step_id)

    def _prepare(self, manifest: Manifest, state: State) -> str:
        """Makes the optimizer's tensors; says which of the stored ones this rank holds."""
        specs = _specs(manifest)
        materialise_optimizer(state, specs)
        return mark_held(tensors_of(state), specs)

    def _read(
        self, step_id: StepId, manifest: Manifest, state: State, marks: Sequence[str]
    ) -> tuple[int, bool]:
        path = self._directory.step_path(step_id)
        specs = _specs(manifest)
        wanted = tensors_of(state)
        needed = held_nowhere(specs, marks) | wanted.keys()  # the others are another rank's
        differences = layout_differences(
            {n: (t.fragment.spec.dtype, t.fragment.spec.shape) for n, t in wanted.items()},
            {n: (s.dtype, s.shape) for n, s in specs.items() if n in needed},
        )
        if differences:
            raise StateMismatchError(str(path), differences)
        all_specs = {n: t.spec for n, t in manifest.tensors.items()}
        fresh = object_destinations(state, manifest.objects, all_specs, str(path))
        of_objects = [live_tensor(name, tensor) for name, tensor in fresh.items()]
        fill_tensors(of_objects, manifest, path, threads=self._threads)
        load_objects(state, manifest.objects, str(path), fresh)
        rng = self._live_rng()
        rng_restored = dict(manifest.mesh) == self._mesh and all(
            t.fragment.spec == all_specs.get(t.fragment.spec.name) for t in rng.values()
        )
        tensors = [*wanted.values(), *(rng.values() if rng_restored else ())]
        fill_tensors(tensors, manifest, path, threads=self._threads)
        if rng_restored:
            set_rng_states({name: t.local for name, t in rng.items()})
        else:
            derive_rng(self._seed, step_id.step, self._coordinate)
        return manifest.size_bytes, rng_restored

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _specs(manifest: Manifest) -> dict[str, TensorSpec]:
    """The tensors of model and optimizer."""
    others = (RNG_PREFIX, OBJECT_PREFIX)
    return {n: t.spec for n, t in manifest.tensors.items() if not n.startswith(others)}


def _version() -> str:
    try:
        return metadata.version("everstep")
    except metadata.PackageNotFoundError:
        return "unknown"
