"""A job's right to write into a directory of checkpoints: its rank 0 holds it, all ranks ask."""

import os
import socket
import time
from collections.abc import Mapping

from everstep.checkpoint.collective import Collective, agree, describe, on_rank0
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.errors import CheckpointError, SaveFailedError
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.lock import DirectoryLock
from everstep.checkpoint.snapshots.memory import OutlivingMemory


class Ownership:
    """Who may save: one job, under one generation at a time.

    A local directory is locked from the first use on. Elsewhere the job remembers which generation
    was the newest when it looked for a step to continue from; its first save creates the next one,
    or fails because another job was faster; every later save makes sure of still being the newest.

    Args:
        directory: the directory.
        collective: the ranks of this job.
        mesh: of this job, for the record of its generation.
        keeper: of this rank, if there is one: it holds the lock, too, since it may still write when
            this job's trainers have died, and it gives it to those that take their place.
    """

    def __init__(
        self,
        directory: CheckpointDirectory,
        collective: Collective,
        mesh: Mapping[str, int],
        keeper: OutlivingMemory | None = None,
    ) -> None:
        self._directory, self._collective, self._mesh = directory, collective, mesh
        self._keeper = keeper
        self._lock: DirectoryLock | None = None
        self._claimed = False
        self._seen: int | None = None
        self.parent: StepId | None = None
        """What the next generation continues from."""
        self.generation: int | None = None
        """The own one; None before the first save, and again after a load."""
        self.owner = ""
        """What the record of the own generation says of its owner."""

    def claim(self) -> None:
        """Lock the directory, or see that it can be written to; every rank calls it, once counts.

        What earlier attempts left half-written is cleared away.

        Raises:
            DirectoryInUseError: another job holds the lock.
            CheckpointError: the directory cannot be written to.
        """
        if not self._claimed:
            on_rank0(self._collective, "claim", self._claim)
            self._claimed = True

    def look(self) -> None:
        """Remember the newest generation, before a step to continue from is chosen; on rank 0."""
        if not self._directory.has_lock:
            self._seen = self._directory.newest_generation()

    def continue_from(self, step_id: StepId) -> None:
        """A step was loaded: the next save begins a generation that continues from it."""
        self.parent, self.generation = step_id, None

    def begin(self, step: int) -> int:
        """The number of this job's generation, which its first save creates; every rank calls it.

        Raises:
            SaveFailedError: it could not be created, or is no longer the newest.
        """
        if self.generation is None or not self._directory.has_lock:
            begun = agree(self._collective, "generation", self._begin)
            if begun.causes:
                raise SaveFailedError(step, begun.causes) from begun.rank0_error
            number, self.owner = begun.results[0]
            self.generation = int(number)
        return self.generation

    def lineage(self) -> dict[str, int | None]:
        """What the own generation inherits, for the part of rank 0."""
        return {
            "parent": self.parent.generation if self.parent else None,
            "fork_step": self.parent.step if self.parent else None,
        }

    def release(self) -> None:
        """Let the next job in; may be called twice."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        self._claimed = False

    def _claim(self) -> None:
        try:
            if self._directory.has_lock:
                self._lock = self._take_lock()
            self.look()
            self._directory.check_writable()
            spare = self._keeper.flushing() if self._keeper is not None else ()
            self._directory.collect_garbage(spare=spare)
        except OSError as e:
            self.release()
            raise CheckpointError(
                f"checkpoints cannot be kept in {self._directory.describe()}: {describe(e)}"
            ) from e

    def _take_lock(self) -> DirectoryLock:
        root, keeper = self._directory.root, self._keeper
        if keeper is None:
            return DirectoryLock(root)
        borrowed = keeper.borrowed_lock(str(root))
        lock = DirectoryLock(root) if borrowed is None else DirectoryLock.taken_over(root, borrowed)
        keeper.lend_lock(str(root), lock.fileno())
        lock.share_with(keeper.name)
        return lock

    def _begin(self) -> tuple[int, str] | None:
        if self._collective.rank != 0:
            return None
        if self.generation is not None:
            self._directory.check_newest(self.generation)
            return self.generation, self.owner
        if self._seen is not None:
            self._directory.check_newest(self._seen)
        lineage = self._directory.lineage()
        if self.parent is None and lineage:
            raise CheckpointError(
                f"{self._directory.describe()} holds checkpoints of an earlier run, up to step "
                f"{lineage[-1].step}: load() one to continue from it, or use another directory"
            )
        owner = (
            f"process {os.getpid()} on {socket.gethostname()}, since "
            f"{time.strftime('%Y-%m-%d %H:%M:%S')} ({os.urandom(4).hex()})"
        )
        created = self._directory.create_generation(
            self.parent, self._mesh, owner=owner, after=self._seen
        )
        self._seen = None if self._seen is None else created.number
        return created.number, owner
