"""Who has voted on a step so far, and who voted that it failed; cheap enough to be asked often."""

import re

from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.records import read_record
from everstep.checkpoint.step_keys import part_key, step_key
from everstep.checkpoint.store import Store
from everstep.checkpoint.votes import HEAD_BYTES, failure_in, is_failure

_PART_NAME = re.compile(r"\d{5,9}\.json")


class Tally:
    """The votes of one step, as far as they have been seen.

    A vote never changes, so that of each the first bytes are read once.

    Args:
        store: of the directory of checkpoints.
        step_id: the step.
        world_size: how many ranks vote.
    """

    def __init__(self, store: Store, step_id: StepId, world_size: int) -> None:
        self._store, self._step_id, self._world_size = store, step_id, world_size
        self._read: set[int] = set()
        self.voted: frozenset[int] = frozenset()
        """Who has voted; a vote is gone when the step was deleted."""
        self.causes: dict[int, str] = {}
        """For each rank that is known to have failed, why."""

    @property
    def complete(self) -> bool:
        """Whether every rank has voted."""
        return len(self.voted) == self._world_size

    def look(self) -> None:
        """List the votes, and read the new ones as far as needed.

        Raises:
            ManifestError: a vote is damaged.
            OSError: as the store reports it.
        """
        names = self._store.list(f"{step_key(self._step_id)}/parts")
        found = {int(name[:-5]) for name in names if _PART_NAME.fullmatch(name)}
        self.voted = frozenset(rank for rank in found if rank < self._world_size)
        for rank in sorted(self.voted - self._read):
            key = part_key(self._step_id, rank)
            if is_failure(self._store.read(key, 0, HEAD_BYTES)):
                cause = failure_in(read_record(self._store, key), self._store.describe(key))
                self.causes[rank] = cause or ""
            self._read.add(rank)
