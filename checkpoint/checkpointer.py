"""The face of checkpointing: save and load a live torch state, in a local directory or a URL."""

import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from types import TracebackType
from typing import Any

from everstep.checkpoint.collective import (
    Collective,
    Outcome,
    SingleProcess,
    on_rank0,
)
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.durable_save import DurableSave
from everstep.checkpoint.errors import (
    IS_DAMAGED,
    CheckpointError,
    LoadFailedError,
    StepExistsError,
)
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.loading import Loading
from everstep.checkpoint.manifest import Manifest
from everstep.checkpoint.ownership import Ownership
from everstep.checkpoint.snapshots.arena import ArenaMemory
from everstep.checkpoint.snapshots.engine import SnapshotEngine
from everstep.checkpoint.snapshots.handle import SaveHandle, StepInfo, durable_handle
from everstep.checkpoint.snapshots.memory import OutlivingMemory, SlotMemory
from everstep.checkpoint.snapshots.report import Interval, SnapshotReport
from everstep.checkpoint.snapshots.restore import Candidates
from everstep.checkpoint.state_capture import Place
from everstep.checkpoint.store import Store
from everstep.checkpoint.stores import open_store
from everstep.checkpoint.torch_load import (
    selection,
)
from everstep.checkpoint.torch_state import (
    State,
)


class Checkpointer:
    """Saves and loads the state of a run; every rank makes the same calls in the same order.

    Args:
        directory: where checkpoints live: a path, the URL of any fsspec file system (s3://…), or
            a store; made when first written to.
        keep: how many of the newest checkpoints to keep; at least 1.
        collective: how ranks agree; None for a single process.
        mesh: size of each mesh axis; None: one axis over all ranks.
        coordinate: this rank's index on each axis of ``mesh``; no two ranks have the same.
        seed: from which random generators are derived when loading on another mesh.
        threads: copy threads of this rank.
        read_only: take no lock, refuse to save.
        storage_options: for the file system of a URL: credentials, endpoint, ….
        durable_every: steps between durable checkpoints, with a snapshot in memory at every save.
        durable_every_s: the same in seconds; with both, whichever comes first.
        memory: where snapshots are; None: in this process, where one of the two before is given.
        timeout_s: how long a save that must not be skipped waits for memory, and ``close`` for
            what is still being written.
        lazy_objects: names of objects of the state whose tensors change only after
            ``wait_captured``; those of all others are copied before ``save`` returns.
        single_writer: promises that never more than one job at a time writes to a URL whose store
            cannot refuse the second.

    A context manager; ``close()`` releases the directory.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | Store,
        *,
        keep: int = 3,
        collective: Collective | None = None,
        mesh: Mapping[str, int] | None = None,
        coordinate: Mapping[str, int] | None = None,
        seed: int = 0,
        threads: int = 1,
        read_only: bool = False,
        storage_options: Mapping[str, Any] | None = None,
        single_writer: bool = False,
        durable_every: int | None = None,
        durable_every_s: float | None = None,
        memory: SlotMemory | None = None,
        timeout_s: float = 600.0,
        lazy_objects: Collection[str] = (),
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
        self._directory = CheckpointDirectory(
            open_store(directory, storage_options=storage_options, single_writer=single_writer)
        )
        self._seed, self._threads, self._read_only = seed, threads, read_only
        self._place = Place(self._collective.rank, self._mesh, place)
        self.loaded: StepInfo | None = None
        """What the last load took; None before one."""
        self._outliving = memory if isinstance(memory, OutlivingMemory) else None
        self._owner = Ownership(
            self._directory, self._collective, self._mesh, keeper=self._outliving
        )
        self._newest_step = -1
        self._durable = DurableSave(
            self._directory, self._collective, self._owner, self._place, keep=keep, threads=threads
        )
        interval = Interval(steps=durable_every, seconds=durable_every_s)
        self._engine: SnapshotEngine | None = None
        if not read_only and (memory is not None or interval.flushes):
            self._engine = SnapshotEngine(
                self._directory,
                self._collective,
                self._owner,
                self._place,
                memory or ArenaMemory(),
                interval=interval,
                order={
                    "keep": keep,
                    "storage_options": storage_options and dict(storage_options),
                    "single_writer": single_writer,
                    "deadline_s": timeout_s,
                },
                threads=threads,
                timeout_s=timeout_s,
                lazy_objects=lazy_objects,
            )

    def save(
        self,
        step: int,
        state: State,
        *,
        durable: bool | None = None,
        on_bytes: Callable[[int], None] | None = None,
    ) -> SaveHandle:
        """Save the state after a step.

        With snapshots it returns at once: call it after every step. Live tensors may change after
        the next step of an optimizer of the state, or ``wait_captured``, has begun. Without, the
        checkpoint is durable when it returns.

        Args:
            step: number of the step that has just been finished, from 0; larger from save to save.
            state: what to save.
            durable: of snapshots: True: never skipped, and made durable at once; False: not made
                durable, even if it is due; None: as the interval says.
            on_bytes: called on each rank with the bytes written so far, by a save that waits.

        Raises:
            SaveFailedError: some rank could not save; causes by rank, nothing of the step is kept.
            StepExistsError: this step was saved already.
            DirectoryInUseError: another job writes to the directory (on a URL a SaveFailedError
                that says so: there, this shows at the first save).
            CheckpointError: the step lies before one that was saved, or the directory cannot be
                written to.
        """
        self._check_step(step)
        self._owner.claim()
        if self._engine is not None:
            handle = self._engine.save(step, state, durable)
        else:
            handle = durable_handle(self._durable.save(step, state, on_bytes))
        self._newest_step = step
        return handle

    def wait_captured(self) -> None:
        """Return when tensors of the last saved state may change; the caller helps with copying.

        Optimizers of the state call it by themselves, before each step.
        """
        if self._engine is not None:
            self._engine.wait_captured()

    def report(self) -> SnapshotReport:
        """How snapshots have gone so far, on this rank."""
        return SnapshotReport() if self._engine is None else self._engine.report

    def load(
        self,
        state: State,
        step: int | None = None,
        *,
        include: Iterable[str] | None = None,
        on_bytes: Callable[[int], None] | None = None,
    ) -> int:
        """Load a checkpoint into a live state, on any number of data-parallel ranks.

        Args:
            state: filled in place; after an error it is not to be used.
            step: which one; None: the newest.
            include: some of "model", "optimizer", "objects" and "rng"; None: everything. What is
                left out stays as it is.
            on_bytes: called on each rank with the bytes loaded so far.

        Returns:
            The next step to run: one more than the one loaded, 0 when nothing was saved yet.
            ``loaded`` tells the details.

        Raises:
            StepNotFoundError: ``step`` was not saved, or is outside the lineage.
            LoadFailedError: some rank found damage, or state that does not fit; causes by rank.
            DirectoryInUseError: another job writes to the directory.
            ValueError: ``include`` names something else.
        """
        begun_s = time.monotonic()
        wanted = selection(include)
        if self._engine is not None:
            self._engine.prepare_load(state)
        if not self._read_only:
            self._owner.claim()
            on_rank0(self._collective, "look", self._owner.look)
        loading = Loading(self._collective, self._place, seed=self._seed, threads=self._threads)
        with Candidates(self._directory, self._collective, self._outliving, step) as found:
            done: Outcome | None = None
            for choice in found.choices:
                with found.open(choice) as source:
                    done = loading.load(choice.step_id, source, state, wanted, on_bytes)
                    where = source.where
                if not any(IS_DAMAGED in cause for cause in done.causes.values()):
                    break
                if choice.tier == "durable":
                    break  # damage on disk is for people to look at
            if done is None:
                return 0
            step_id = choice.step_id
            if done.causes:
                others = [s for s in found.durable_steps if s != step_id.step]
                raise LoadFailedError(step_id.step, done.causes, others) from done.error
        size_bytes, rng_restored = done.results[self._collective.rank]
        self._owner.continue_from(step_id)
        if self._engine is not None:
            in_memory = choice.tier == "memory"
            self._engine.began_from(step_id, memory=in_memory)
        self._newest_step = step_id.step
        self.loaded = StepInfo(
            step=step_id.step,
            generation=step_id.generation,
            path=where,
            size_bytes=size_bytes,
            duration_s=time.monotonic() - begun_s,
            rng_restored=rng_restored,
            why=choice.why,
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
        """Wait for what is being written, and release the directory; may be called twice.

        Raises:
            SaveFailedError: the last checkpoint of the interval could not be made durable.
        """
        self._close(finished=True)

    def _close(self, *, finished: bool) -> None:
        try:
            if self._engine is not None:
                self._engine.close(finished=finished)
        finally:
            self._owner.release()

    def _check_step(self, step: int) -> None:
        if self._read_only:
            raise CheckpointError(
                f"{self._directory.describe()} was opened read-only: open it to write"
            )
        if step == self._newest_step and self._owner.generation is not None:
            raise StepExistsError(self._directory.describe(StepId(self._owner.generation, step)))
        if step < self._newest_step or step < 0:
            raise CheckpointError(
                f"step {step} cannot be saved after step {self._newest_step}: steps ascend from 0; "
                "load() an earlier step to continue from there"
            )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close(finished=error is None)
