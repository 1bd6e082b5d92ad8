"""The records of generations in a store: read, made again where lost, created as a claim."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence

from everstep.checkpoint.errors import DirectoryInUseError, ManifestError
from everstep.checkpoint.lineage import (
    Generation,
    StepId,
    decode_generation,
    encode_generation,
    first_generation,
    generation_from,
)
from everstep.checkpoint.manifest import Manifest
from everstep.checkpoint.records import read_record
from everstep.checkpoint.step_keys import (
    generation_key,
    is_committed,
    put_once,
    recorded_generations,
    steps_in,
)
from everstep.checkpoint.store import Store


class Generations:
    """The generations of one directory of checkpoints.

    Args:
        store: where the directory is.
        manifest: reads the manifest of a committed step; raises ManifestError.
    """

    def __init__(self, store: Store, manifest: Callable[[StepId], Manifest]) -> None:
        self._store, self._manifest = store, manifest
        self._known: dict[int, Generation] = {}
        """Of an object store: records never change, and each is a request."""

    def all(self) -> dict[int, Generation]:
        """All generations by number; see ``CheckpointDirectory.generations``."""
        steps = steps_in(self._store)
        found = {1: first_generation()} if any(s.generation == 1 for s in steps) else {}
        for number in recorded_generations(self._store):
            found[number] = self._read(number, steps)
        for number in {s.generation for s in steps} - found.keys():
            with contextlib.suppress(ManifestError):  # lineage() says so where a step needs it
                found[number] = self._rebuilt(number, steps, None)
        return found

    def newest(self) -> int:
        """The largest number that a generation has taken; 0 when there is none."""
        taken = [*recorded_generations(self._store)]
        taken += [s.generation for s in steps_in(self._store)]
        return max(taken, default=0)

    def create(
        self,
        parent: StepId | None,
        mesh: Mapping[str, int],
        *,
        now_s: float | None,
        owner: str,
        after: int | None,
    ) -> Generation:
        """See ``CheckpointDirectory.create_generation``."""
        while True:
            generation = Generation(
                number=1 + (self.newest() if after is None else after),
                parent=parent.generation if parent else None,
                fork_step=parent.step if parent else None,
                created_s=time.time() if now_s is None else now_s,
                mesh=dict(mesh),
                owner=owner,
            )
            try:
                key = generation_key(generation.number)
                put_once(self._store, key, encode_generation(generation))
            except FileExistsError:
                if after is not None:
                    raise self.lost_to(generation.number) from None
                continue
            return generation

    def lost_to(self, number: int) -> DirectoryInUseError:
        """The error of a job that found another one's generation where its own was to be."""
        holder = ""
        with contextlib.suppress(ManifestError, OSError):
            holder = self._read(number, []).owner
        return DirectoryInUseError(
            self._store.describe(),
            f"{holder or 'an unknown process'} has begun generation {number}",
        )

    def _read(self, number: int, steps: Sequence[StepId]) -> Generation:
        if number in self._known:
            return self._known[number]
        key = generation_key(number)
        where = self._store.describe(key)
        try:
            found = decode_generation(read_record(self._store, key), where)
        except ManifestError as e:
            return first_generation() if number == 1 else self._rebuilt(number, steps, e)
        if found.number != number:
            raise ManifestError(where, f"it says that it is number {found.number}")
        if self._store.local_path() is None:
            self._known[number] = found
        return found

    def _rebuilt(
        self, number: int, steps: Sequence[StepId], error: ManifestError | None
    ) -> Generation:
        """What a lost or damaged record said, from any manifest of its generation."""
        where = self._store.describe(generation_key(number))
        for step_id in steps:
            if step_id.generation == number and is_committed(self._store, step_id):
                with contextlib.suppress(ManifestError):
                    if (told := self._manifest(step_id).lineage) is not None:
                        return generation_from(number, told._asdict(), where)
        raise error or ManifestError(where, "the file is missing")
