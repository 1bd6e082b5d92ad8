"""The directory of a run's checkpoints: who is there, what is committed, how a step is committed.

::

    generations/00003.json                    created exclusively by the first save of an attempt
    step-00001200-g00003/
        rank-00000-<attempt>.safetensors      packs
        parts/00000.json                      the vote of one writer: its pack is durable
        index.ocdbt, manifest.ocdbt           for TensorStore, see views/; not read by us
        manifest.json                         written last; its presence IS the commit

A step exists if and only if its manifest does; everything else is garbage to collect.
"""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from everstep.checkpoint.direct_io import make_directory, publish, sync_directory, write_durable
from everstep.checkpoint.errors import ManifestError, StepNotFoundError
from everstep.checkpoint.lineage import (
    Generation,
    StepId,
    decode_generation,
    encode_generation,
    first_generation,
    in_lineage,
)
from everstep.checkpoint.manifest import (
    Manifest,
    Part,
    build_manifest,
    decode_manifest,
    decode_part,
    encode_manifest,
    encode_part,
)
from everstep.checkpoint.records import read_bytes
from everstep.checkpoint.retention import superfluous
from everstep.checkpoint.views.index_files import index_files

_STEP_NAME = re.compile(r"step-(\d{8,18})-g(\d{5,9})")
_GENERATION_NAME = re.compile(r"(\d{5,9})\.json")
_MANIFEST = "manifest.json"


class CheckpointDirectory:
    """A local directory of checkpoints; holds no state but the path."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def step_path(self, step_id: StepId) -> Path:
        """Directory of one checkpoint, committed or not."""
        return self.root / f"step-{step_id.step:08d}-g{step_id.generation:05d}"

    def check_writable(self) -> None:
        """Fail now, as a save would in an hour.

        Raises:
            OSError: as the file system reports it.
        """
        make_directory(self.root / "generations")
        for folder in (self.root, self.root / "generations"):
            probe = folder / ".writable"
            probe.touch()
            probe.unlink()

    def generations(self) -> dict[int, Generation]:
        """All generations by number.

        The first one needs no record: a damaged or missing one costs nothing.

        Raises:
            ManifestError: the record of a later one is damaged.
        """
        found = {}
        if any(step_id.generation == 1 for step_id in self._step_dirs()):
            found[1] = first_generation()
        for path in sorted(self._list(self.root / "generations")):
            if match := _GENERATION_NAME.fullmatch(path.name):
                number = int(match[1])
                try:
                    found[number] = decode_generation(read_bytes(path), path)
                except ManifestError:
                    if number != 1:
                        raise
                    found[number] = first_generation()
                if found[number].number != number:
                    raise ManifestError(path, f"it says that it is number {found[number].number}")
        return found

    def create_generation(
        self, parent: StepId | None, mesh: Mapping[str, int], *, now_s: float | None = None
    ) -> Generation:
        """Begin a new generation that continues from ``parent`` (None: from nothing)."""
        folder = self.root / "generations"
        make_directory(folder)
        while True:
            names = (_GENERATION_NAME.fullmatch(p.name) for p in folder.iterdir())
            taken = [int(match[1]) for match in names if match]
            taken += [step_id.generation for step_id in self._step_dirs()]
            generation = Generation(
                number=1 + max(taken, default=0),
                parent=parent.generation if parent else None,
                fork_step=parent.step if parent else None,
                created_s=time.time() if now_s is None else now_s,
                mesh=dict(mesh),
            )
            try:
                publish(
                    self._generation_path(generation.number),
                    encode_generation(generation),
                    folder / "new.tmp",
                )
            except FileExistsError:
                continue
            return generation

    def committed(self) -> list[StepId]:
        """Every committed checkpoint, of any lineage, in ascending order."""
        return sorted(s for s in self._step_dirs() if (self.step_path(s) / _MANIFEST).exists())

    def lineage(self) -> list[StepId]:
        """The checkpoints that the newest generation may resume from, ascending by step.

        Raises:
            ManifestError: the record of a generation is damaged or missing.
        """
        generations, committed = self.generations(), self.committed()
        for step_id in committed:
            if step_id.generation not in generations:
                path = self._generation_path(step_id.generation)
                raise ManifestError(
                    path,
                    f"the file is missing, step {step_id.step} needs it to tell which earlier "
                    "steps belong to the same run: restore it from a copy of the directory",
                )
        return in_lineage(generations, committed)

    def find(self, step: int | None) -> StepId | None:
        """The checkpoint of a step in the lineage; None asks for the newest, if there is one.

        Raises:
            StepNotFoundError: this step is not there.
        """
        lineage = self.lineage()
        if step is None:
            return lineage[-1] if lineage else None
        for step_id in lineage:
            if step_id.step == step:
                return step_id
        raise StepNotFoundError(str(self.root), step, [s.step for s in lineage])

    def manifest(self, step_id: StepId) -> Manifest:
        """Read a committed manifest; raises ManifestError and its kinds."""
        path = self.step_path(step_id) / _MANIFEST
        manifest = decode_manifest(read_bytes(path), path)
        found = StepId(manifest.generation, manifest.step)
        if found != step_id:
            raise ManifestError(path, f"it belongs to another directory: it is {found}")
        return manifest

    def begin_step(self, step_id: StepId) -> Path:
        """Make the directory of a step that is to be saved; every writer calls it."""
        path = self.step_path(step_id)
        (path / "parts").mkdir(parents=True, exist_ok=True)
        return path

    def put_part(self, part: Part) -> None:
        """Vote: the pack of this part is durable."""
        folder = self.step_path(StepId(part.generation, part.step)) / "parts"
        write_durable(folder / f"{part.rank:05d}.json", encode_part(part))

    def commit(self, step_id: StepId, world_size: int) -> Manifest:
        """Publish the manifest of a step whose parts are all there.

        Raises:
            ManifestError: a part is missing or damaged.
            LayoutError: the parts do not hold each tensor exactly once.
        """
        path = self.step_path(step_id)
        files = [path / "parts" / f"{rank:05d}.json" for rank in range(world_size)]
        for file in files:
            if not file.exists():
                raise ManifestError(file, "the file is missing: do all ranks share this directory?")
        manifest = build_manifest([decode_part(read_bytes(f), f) for f in files])
        for directory in (path / "parts", path, self.root):
            sync_directory(directory)
        for name, data in index_files(manifest).items():
            publish(path / name, data, path / f"{name}.tmp")
        publish(path / _MANIFEST, encode_manifest(manifest), path / f"{_MANIFEST}.tmp")
        return manifest

    def delete(self, step_id: StepId) -> None:
        """Remove a checkpoint: first its manifest, durably, so that it is never half there."""
        path = self.step_path(step_id)
        try:
            if (path / _MANIFEST).exists():
                (path / _MANIFEST).unlink()
                sync_directory(path)
            shutil.rmtree(path)
        except FileNotFoundError:
            return

    def retire(self, keep: int, current: int) -> list[StepId]:
        """Delete what retention does not keep; the caller holds the lock of the directory."""
        gone = superfluous(self.committed(), self.lineage(), keep, current)
        for step_id in gone:
            self.delete(step_id)
        return gone

    def collect_garbage(self) -> list[StepId]:
        """Delete steps that were begun and never committed; those that were deleted.

        Only for the holder of the directory's lock, before it begins a step: nobody else can own
        one then. What cannot be deleted stays for the next time (a rank of a killed job may still
        be writing into it): it is never listed.
        """
        gone = []
        for step_id in self._step_dirs():
            if not (self.step_path(step_id) / _MANIFEST).exists():
                with contextlib.suppress(OSError):
                    self.delete(step_id)
                    gone.append(step_id)
        return gone

    def _step_dirs(self) -> list[StepId]:
        found = []
        for path in self._list(self.root):
            if match := _STEP_NAME.fullmatch(path.name):
                step_id = StepId(int(match[2]), int(match[1]))
                if self.step_path(step_id) == path:  # not so with surplus leading zeros
                    found.append(step_id)
        return found

    def _generation_path(self, number: int) -> Path:
        return self.root / "generations" / f"{number:05d}.json"

    @staticmethod
    def _list(path: Path) -> list[Path]:
        try:
            return [path / name for name in os.listdir(path)]
        except FileNotFoundError:
            return []
