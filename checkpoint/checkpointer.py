"""The face of checkpointing: save and load a live torch state in a local directory."""

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType

import torch

from everstep.checkpoint.collective import Collective, SingleProcess, agree, on_rank0
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.errors import (
    CheckpointError,
    LoadFailedError,
    SaveFailedError,
    StateMismatchError,
)
from everstep.checkpoint.layout import Box, Fragment, TensorSpec
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.lock import DirectoryLock
from everstep.checkpoint.manifest import Manifest, Part
from everstep.checkpoint.pack import PackPlan, PackReader, plan_pack, write_pack
from everstep.checkpoint.reshard import layout_differences, plan_load, plan_save
from everstep.checkpoint.torch_rng import derive_rng, rng_states, set_rng_states
from everstep.checkpoint.torch_state import (
    LiveTensor,
    State,
    live_tensor,
    load_objects,
    materialise_optimizer,
    objects_of,
    strided_bytes,
    tensors_of,
)


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
        coordinate: this rank's index on each axis of ``mesh``.
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
        if keep < 1:
            raise ValueError(f"keep={keep}: at least the newest checkpoint is kept")
        self._collective = collective or SingleProcess()
        self._directory = CheckpointDirectory(Path(directory))
        self._keep, self._seed, self._threads, self._read_only = keep, seed, threads, read_only
        self._mesh = dict(mesh or {"rank": self._collective.world_size})
        place = coordinate or {"rank": self._collective.rank}
        self._coordinate = ".".join(f"{axis}{index}" for axis, index in place.items())
        self._attempt = hashlib.blake2b(
            f"{time.time_ns()}/{platform.node()}/{id(self)}".encode(), digest_size=4
        ).hexdigest()
        self.loaded: StepInfo | None = None
        """What the last load took; None before one."""
        self._lock: DirectoryLock | None = None
        self._claimed = False
        self._parent: StepId | None = None
        self._generation: int | None = None
        self._plan_key: tuple[bytes, ...] = ()
        self._plan: PackPlan | None = None

    def save(
        self, step: int, state: State, *, on_bytes: Callable[[int], None] | None = None
    ) -> StepInfo:
        """Save the state after a step; when it returns, the checkpoint is durable.

        Args:
            step: number of the step that has just been finished, from 0.
            state: what to save.
            on_bytes: called on each rank with the bytes written so far.

        Raises:
            SaveFailedError: some rank could not write; nothing of the step is kept.
            StepExistsError: this step was saved already.
            DirectoryInUseError: another job writes to the directory.
        """
        begun_s = time.monotonic()
        if self._read_only:
            raise CheckpointError(f"{self._directory.root} was opened read-only: open it to write")
        self._claim()
        live = self._capture(state)
        context = self._context(state)
        plan = self._plan_for([t.fragment for t in live.values()])
        step_id = StepId(self._begin_generation(), step)
        path = self._directory.step_path(step_id)
        on_rank0(self._collective, "begin", lambda: str(self._directory.begin_step(step_id)))
        done = agree(
            self._collective,
            "written",
            lambda: self._write(step_id, plan, live, context, on_bytes),
        )
        if not done.causes:
            done = agree(self._collective, "committed", lambda: self._commit(step_id))
        if done.causes:
            on_rank0(self._collective, "clean up", lambda: self._directory.delete(step_id))
            raise SaveFailedError(step, done.causes) from done.error
        size_bytes = on_rank0(self._collective, "retire", lambda: self._retire(step_id))
        return StepInfo(
            step=step,
            generation=step_id.generation,
            path=str(path),
            size_bytes=size_bytes,
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
        found = on_rank0(self._collective, "find", lambda: self._directory.find(step))
        if found is None:
            return 0
        step_id = StepId(*found)
        done = agree(self._collective, "loaded", lambda: self._read(step_id, state))
        if done.causes:
            others = [s.step for s in self._directory.lineage() if s != step_id]
            raise LoadFailedError(step_id.step, done.causes, others) from done.error
        assert done.result is not None
        size_bytes, rng_restored = done.result
        self._parent, self._generation = step_id, None
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
        return (self.steps() or [None])[-1]

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

    def _claim(self) -> None:
        """Lock the directory and clear away what earlier attempts left half-written."""
        if self._claimed or self._read_only:
            return

        def lock() -> None:
            self._lock = DirectoryLock(self._directory.root)
            self._directory.collect_garbage()

        on_rank0(self._collective, "claim", lock)
        self._claimed = True

    def _begin_generation(self) -> int:
        if self._generation is None:
            self._generation = on_rank0(self._collective, "generation", self._new_generation)
        return self._generation

    def _new_generation(self) -> int:
        lineage = self._directory.lineage()
        if self._parent is None and lineage:
            raise CheckpointError(
                f"{self._directory.root} holds checkpoints of an earlier run, up to step "
                f"{lineage[-1].step}: load() one to continue from it, or use another directory"
            )
        return self._directory.create_generation(self._parent, self._mesh).number

    def _capture(self, state: State) -> dict[Fragment, LiveTensor]:
        live = {t.fragment: t for t in tensors_of(state).values() if t.local.numel()}
        for name, value in rng_states().items():
            tensor = live_tensor(f"rng.{self._coordinate}.{name}", value)
            live[tensor.fragment] = tensor
        return live

    def _context(self, state: State) -> dict[str, object]:
        if self._collective.rank != 0:
            return {}
        producer = {
            "everstep": _version(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        return {"mesh": self._mesh, "producer": producer, "objects": objects_of(state)}

    def _plan_for(self, fragments: list[Fragment]) -> PackPlan:
        """The pack that this rank writes; planned anew only when some rank's layout changed."""
        layout = json.dumps(
            [
                [f.spec.name, f.spec.dtype, f.spec.shape, f.box.offset, f.box.shape]
                for f in fragments
            ]
        ).encode()
        key = tuple(self._collective.exchange("layout", hashlib.blake2b(layout).digest()))
        if self._plan is None or key != self._plan_key:
            layouts = [
                [
                    Fragment(TensorSpec(n, d, tuple(s)), Box(tuple(o), tuple(b)))
                    for n, d, s, o, b in json.loads(reply)
                ]
                for reply in self._collective.exchange("layouts", layout)
            ]
            rank = self._collective.rank
            self._plan, self._plan_key = plan_pack(rank, plan_save(layouts)[rank]), key
        return self._plan

    def _write(
        self,
        step_id: StepId,
        plan: PackPlan,
        live: Mapping[Fragment, LiveTensor],
        context: dict[str, object],
        on_bytes: Callable[[int], None] | None,
    ) -> None:
        name = f"rank-{plan.rank:05d}-{self._attempt}.safetensors"
        sources = {f: strided_bytes(live[f].local.cpu()) for f in plan.fragments}
        record = write_pack(
            self._directory.step_path(step_id) / name,
            plan,
            sources,
            threads=self._threads,
            on_bytes=on_bytes,
        )
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

    def _commit(self, step_id: StepId) -> None:
        if self._collective.rank == 0:
            self._directory.commit(step_id, self._collective.world_size)

    def _retire(self, step_id: StepId) -> int:
        self._directory.retire(self._keep, step_id.generation)
        return self._directory.manifest(step_id).size_bytes

    def _read(self, step_id: StepId, state: State) -> tuple[int, bool]:
        path = self._directory.step_path(step_id)
        manifest = self._directory.manifest(step_id)
        specs = {name: t.spec for name, t in manifest.tensors.items()}
        materialise_optimizer(state, specs)
        wanted = tensors_of(state)
        differences = layout_differences(
            {n: (t.fragment.spec.dtype, t.fragment.spec.shape) for n, t in wanted.items()},
            {n: (s.dtype, s.shape) for n, s in specs.items() if not n.startswith("rng.")},
        )
        if differences:
            raise StateMismatchError(str(path), differences)
        rng = {
            name: live_tensor(f"rng.{self._coordinate}.{name}", value)
            for name, value in rng_states().items()
            if dict(manifest.mesh) == self._mesh and f"rng.{self._coordinate}.{name}" in specs
        }
        self._fill([*wanted.values(), *rng.values()], manifest, path)
        load_objects(state, manifest.objects, str(path))
        if rng:
            set_rng_states({name: t.local for name, t in rng.items()})
        else:
            derive_rng(self._seed, step_id.step, self._coordinate)
        return manifest.size_bytes, bool(rng)

    def _fill(self, tensors: list[LiveTensor], manifest: Manifest, path: Path) -> None:
        """Copy every tensor's box out of the packs, pack by pack."""
        indexes = manifest.pack_indexes
        jobs: dict[int, list[tuple[LiveTensor, Box, Box]]] = {}
        for tensor in tensors:
            stored = manifest.tensors[tensor.fragment.spec.name]
            for copy in plan_load(stored.grid, stored.packs, tensor.fragment.box):
                jobs.setdefault(copy.pack, []).append((tensor, copy.cell, copy.box))
        hosts = {id(t): t.local if t.local.device.type == "cpu" else t.local.cpu() for t in tensors}
        with ExitStack() as files, torch.no_grad():
            for pack, copies in sorted(jobs.items()):
                record = manifest.packs[pack]
                reader = files.enter_context(
                    PackReader(path / record.file, record, threads=self._threads)
                )
                for tensor, cell, box in copies:
                    start, fragment = indexes[pack].starts[tensor.fragment.spec.name, cell.offset]
                    target = strided_bytes(hosts[id(tensor)])
                    inside = box.relative_to(tensor.fragment.box)
                    offset = target.offset_bytes + sum(
                        i * s for i, s in zip(inside, target.strides_bytes, strict=True)
                    )
                    reader.read_box(fragment, start, box, target, offset)
            for tensor in tensors:
                host = hosts[id(tensor)]
                if host is not tensor.local:
                    tensor.local.copy_(host)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _version() -> str:
    try:
        return metadata.version("everstep")
    except metadata.PackageNotFoundError:
        return "unknown"
