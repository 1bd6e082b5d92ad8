"""The directory of a run's checkpoints: who is there, what is committed, how a step is committed.

::

    generations/00003.json                    created exclusively by the first save of an attempt
    step-00001200-g00003/
        rank-00000-<attempt>.safetensors      packs
        parts/00000.json                      vote of a writer: its pack is durable, or why not
        index.ocdbt, manifest.ocdbt           for TensorStore, see views/; not read by us
        manifest.json                         written last; its presence IS the commit

A step exists if and only if its manifest does; everything else is garbage to collect. The directory
is a local folder, whose one writer holds a lock, or another store, where creating the record of a
generation is the claim: of two jobs that go on from the same state one creates it, and a job that
finds a newer generation than its own has lost the directory and stops.
"""

import contextlib
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from everstep.checkpoint.assembly import Assembly
from everstep.checkpoint.direct_io import make_directory
from everstep.checkpoint.errors import (
    CheckpointError,
    ManifestError,
    SaveFailedError,
    StepExistsError,
    StepNotFoundError,
)
from everstep.checkpoint.generations import Generations
from everstep.checkpoint.leases import free_to_delete, held_for_reading
from everstep.checkpoint.lineage import Generation, StepId, in_lineage
from everstep.checkpoint.manifest import (
    Manifest,
    Part,
    decode_manifest,
    encode_manifest,
    encode_part,
    lineage_of,
)
from everstep.checkpoint.records import read_record
from everstep.checkpoint.retention import abandoned, superfluous
from everstep.checkpoint.step_keys import (
    GENERATIONS,
    generation_key,
    is_committed,
    manifest_key,
    part_key,
    put_once,
    step_key,
    steps_in,
)
from everstep.checkpoint.step_reader import StepReader
from everstep.checkpoint.store import Folder, Store
from everstep.checkpoint.store_local import LocalStore
from everstep.checkpoint.stores import open_store
from everstep.checkpoint.votes import encode_failure, failure_in

GRACE_S = 3600.0
"""How long a writer on a store without a lock may need to notice that it lost the directory."""
READS_AT_ONCE = 16
_NOT_SHARED = "the file is missing: do all ranks share this directory?"
_TOO_LATE = "it did not say in time that its pack is durable (hung or lost?)"


class CheckpointDirectory:
    """A directory of checkpoints: a path, a URL or a store; knows nothing but where it is.

    (And, so that committing is fast, how the step was laid out that it has committed last.)
    """

    def __init__(self, where: str | os.PathLike[str] | Store) -> None:
        self.store = open_store(where)
        self._generations = Generations(self.store, self.manifest)
        self._assembly = Assembly()

    @property
    def has_lock(self) -> bool:
        """Whether a lock keeps other writers out; else the newest generation owns the directory."""
        return self.store.local_path() is not None

    @property
    def root(self) -> Path:
        """The local folder; raises CheckpointError where there is none."""
        return self._local("")

    def step_path(self, step_id: StepId) -> Path:
        """Local folder of one checkpoint, committed or not; raises CheckpointError."""
        return self._local(step_key(step_id))

    def describe(self, step_id: StepId | None = None) -> str:
        """Path or URL of the directory, or of a checkpoint in it."""
        return self.store.describe("" if step_id is None else step_key(step_id))

    def check_writable(self) -> None:
        """Fail now, as a save would in an hour.

        Raises:
            OSError: as the store reports it.
            CheckpointError: the store replaces what it should only create.
        """
        if self.has_lock:
            make_directory(self.root / GENERATIONS)
            for folder in (self.root, self.root / GENERATIONS):
                probe = folder / ".writable"
                probe.touch()
                probe.unlink()
            return
        key = f".writable-{os.urandom(4).hex()}"
        self.store.put(key, b"1")
        try:
            self.store.put(key, b"2")
        except FileExistsError:
            return
        finally:
            self.store.delete(key)
        raise CheckpointError(
            f"{self.describe()} replaced an object that it was to create only where there is none: "
            "pass single_writer=True if never more than one job at a time writes there"
        )

    def generations(self) -> dict[int, Generation]:
        """All generations by number.

        The first one needs no record; a later one whose record is lost or damaged is taken from a
        manifest that it committed.

        Raises:
            ManifestError: the record of a later one is damaged, and no manifest tells what it was.
        """
        return self._generations.all()

    def newest_generation(self) -> int:
        """The largest number that a generation has taken; 0 when there is none."""
        return self._generations.newest()

    def create_generation(
        self,
        parent: StepId | None,
        mesh: Mapping[str, int],
        *,
        now_s: float | None = None,
        owner: str = "",
        after: int | None = None,
    ) -> Generation:
        """Begin a new generation that continues from ``parent`` (None: from nothing).

        Args:
            parent: the step that was loaded.
            mesh: of the run.
            now_s: the time, for its record.
            owner: says who it is; different for each attempt.
            after: the newest generation when the parent was chosen; None: there is no other writer.

        Raises:
            DirectoryInUseError: another job has begun one after that.
        """
        if self.has_lock:
            make_directory(self.root / GENERATIONS)
        return self._generations.create(parent, mesh, now_s=now_s, owner=owner, after=after)

    def check_newest(self, generation: int) -> None:
        """Raises DirectoryInUseError where another job has begun a newer generation."""
        if (newest := self.newest_generation()) > generation:
            raise self._generations.lost_to(newest)

    def committed(self) -> list[StepId]:
        """Every committed checkpoint, of any lineage, in ascending order."""
        return sorted(s for s in steps_in(self.store) if is_committed(self.store, s))

    def lineage(self, committed: Sequence[StepId] | None = None) -> list[StepId]:
        """The checkpoints that the newest generation may resume from, ascending by step.

        Args:
            committed: what ``committed()`` has just said, where that is known.

        Raises:
            ManifestError: the record of a generation is damaged or missing.
        """
        generations = self.generations()
        committed = self.committed() if committed is None else committed
        for step_id in committed:
            if step_id.generation not in generations:
                raise ManifestError(
                    self.store.describe(generation_key(step_id.generation)),
                    f"the file is missing, step {step_id.step} needs it to tell which earlier "
                    "steps belong to the same run: restore it from a copy of the directory",
                )
        return in_lineage(generations, committed)

    def find(self, step: int | None, lineage: Sequence[StepId] | None = None) -> StepId | None:
        """The checkpoint of a step in the lineage; None asks for the newest, if there is one.

        Args:
            step: its number.
            lineage: what ``lineage()`` has just said, where that is known.

        Raises:
            StepNotFoundError: this step is not there.
        """
        lineage = self.lineage() if lineage is None else lineage
        if step is None:
            return lineage[-1] if lineage else None
        for step_id in lineage:
            if step_id.step == step:
                return step_id
        raise StepNotFoundError(self.describe(), step, [s.step for s in lineage])

    def manifest(self, step_id: StepId) -> Manifest:
        """Read a committed manifest; raises ManifestError and its kinds."""
        key = manifest_key(step_id)
        manifest = decode_manifest(read_record(self.store, key), self.store.describe(key))
        found = StepId(manifest.generation, manifest.step)
        if found != step_id:
            where = self.store.describe(key)
            raise ManifestError(where, f"it belongs to another directory: it is {found}")
        return manifest

    @contextlib.contextmanager
    def held(self, step_id: StepId) -> Iterator[None]:
        """Keep retention from deleting a committed step while the context is open."""
        with held_for_reading(self.store, step_key(step_id), manifest_key(step_id)):
            yield

    def reader(
        self, step_id: StepId, manifest: Manifest | None = None, *, threads: int = 1
    ) -> StepReader:
        """Reads tensors of a committed step, wherever it is; raises ManifestError and its kinds."""
        folder = Folder(self.store, step_key(step_id))
        return StepReader(folder, manifest or self.manifest(step_id), threads=threads)

    def begin_step(self, step_id: StepId) -> Path:
        """Make the local folder of a step that is to be saved; every writer may call it."""
        path = self.step_path(step_id)
        (path / "parts").mkdir(parents=True, exist_ok=True)
        return path

    def put_part(self, part: Part) -> None:
        """Vote: the pack of this part is durable.

        Raises:
            CheckpointError: the others have given this rank up.
            FileExistsError: another attempt has voted.
        """
        self.put_vote(StepId(part.generation, part.step), part.rank, encode_part(part))

    def put_vote(self, step_id: StepId, rank: int, part: bytes) -> None:
        """``put_part`` of a part that is encoded already."""
        key = part_key(step_id, rank)
        try:
            put_once(self.store, key, part, settle=False)
        except FileExistsError:
            if cause := self._failure(key):
                raise CheckpointError(f"rank {rank} was given up: {cause}") from None
            raise

    def put_failure(self, step_id: StepId, rank: int, cause: str) -> None:
        """Vote: this writer failed, and why."""
        put_once(self.store, part_key(step_id, rank), encode_failure(rank, cause), settle=False)

    def give_up(self, step_id: StepId, world_size: int) -> dict[int, str]:
        """Wait no longer: a rank that has not voted has failed; for each that has, why.

        All who call it get the same answer, as far as ranks have not voted between their calls.
        """
        causes = {}
        for rank in range(world_size):
            key = part_key(step_id, rank)
            if self.store.size(key) is None:
                with contextlib.suppress(FileExistsError):  # it, or another one, was faster
                    self.put_failure(step_id, rank, _TOO_LATE)
            if cause := self._failure(key):
                causes[rank] = cause
        return causes

    def commit(self, step_id: StepId, world_size: int) -> Manifest:
        """Publish the manifest of a step whose parts are all there; anyone may, more than once.

        Raises:
            ManifestError: a part is missing or damaged.
            LayoutError: the parts do not hold each tensor exactly once.
            SaveFailedError: a part says that its writer failed; causes by rank.
            StepExistsError: the step is committed with other content.
        """
        parts = self._parts(step_id, world_size)
        lineage = lineage_of(parts[0], self.store.describe(part_key(step_id, 0)))
        manifest = self._assembly.manifest(parts, lineage)
        folder = step_key(step_id)
        try:
            for name, data in self._assembly.index_files(manifest).items():
                put_once(self.store, f"{folder}/{name}", data, settle=False)
            self.store.settle([f"{folder}/parts", folder, ""])
            put_once(self.store, manifest_key(step_id), encode_manifest(manifest))
        except FileExistsError:
            raise StepExistsError(self.describe(step_id)) from None
        return manifest

    def delete(self, step_id: StepId) -> None:
        """Remove a checkpoint: first its manifest, durably, so that it is never half there."""
        if is_committed(self.store, step_id):
            with contextlib.suppress(FileNotFoundError):
                self.store.delete(manifest_key(step_id))
                self.store.settle([step_key(step_id)])
        self.store.delete(step_key(step_id))

    def retire(self, keep: int, current: int) -> list[StepId]:
        """Delete what retention does not keep and nobody is reading; those that were deleted.

        Only for the holder of the directory's lock; without one, for the newest generation.

        Raises:
            DirectoryInUseError: ``current`` is no longer the newest generation.
        """
        if not self.has_lock:
            self.check_newest(current)
        gone = []
        committed = self.committed()
        for step_id in superfluous(committed, self.lineage(committed), keep, current):
            folder, manifest = step_key(step_id), manifest_key(step_id)
            with free_to_delete(self.store, folder, manifest) as free:
                if free:
                    self.delete(step_id)
                    gone.append(step_id)
        return gone

    def collect_garbage(
        self,
        *,
        grace_s: float = GRACE_S,
        now_s: float | None = None,
        spare: Collection[StepId] = (),
    ) -> list[StepId]:
        """Delete steps that were begun and never committed; those that were deleted.

        Args:
            grace_s: how long a writer may need to notice that it lost a store without a lock.
            now_s: the time, seconds since the epoch.
            spare: what a keeper is still writing for the holder of the lock.

        Where there is a lock, only for its holder, before it begins a step: nobody else can own one
        then. Where there is none, for anyone: see ``abandoned``. What cannot be deleted stays for
        the next time (a rank of a killed job may still be writing into it): it is never listed.
        """
        steps = steps_in(self.store)
        committed = [s for s in steps if is_committed(self.store, s)]
        garbage = sorted(set(steps) - {*committed, *spare})
        if self.has_lock:
            if isinstance(self.store, LocalStore):
                self.store.clear_temporaries(GENERATIONS)
        elif garbage:
            garbage = abandoned(
                garbage,
                committed,
                self.generations(),
                now_s=time.time() if now_s is None else now_s,
                grace_s=grace_s,
            )
        gone = []
        for step_id in garbage:
            with contextlib.suppress(OSError):
                self.delete(step_id)
                gone.append(step_id)
        return gone

    def _failure(self, key: str) -> str | None:
        return failure_in(read_record(self.store, key), self.store.describe(key))

    def _parts(self, step_id: StepId, world_size: int) -> list[Part]:
        keys = [part_key(step_id, rank) for rank in range(world_size)]
        records = self._read_records(keys, _NOT_SHARED)
        named = [(self.store.describe(key), data) for key, data in zip(keys, records, strict=True)]
        failures = {rank: failure_in(data, path) for rank, (path, data) in enumerate(named)}
        if causes := {rank: cause for rank, cause in failures.items() if cause is not None}:
            raise SaveFailedError(step_id.step, causes)
        return self._assembly.parts(named)

    def _read_records(self, keys: Sequence[str], missing: str) -> list[bytes]:
        if self.has_lock:
            return [read_record(self.store, key, missing) for key in keys]
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            return list(pool.map(lambda key: read_record(self.store, key, missing), keys))

    def _local(self, key: str) -> Path:
        path = self.store.local_path(key)
        if path is None:
            raise CheckpointError(
                f"{self.store.describe(key)} is not a local folder: this needs one; copy the "
                "checkpoint to a local disk first"
            )
        return path
