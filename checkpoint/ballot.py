"""Ranks commit a step together: each votes with a file, rank 0 publishes what all voted for."""

import contextlib
import warnings
from collections.abc import Callable

from everstep.checkpoint.collective import Collective, Outcome, agree, describe
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.errors import (
    CheckpointError,
    CollectiveError,
    EverstepError,
    SaveFailedError,
)
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.manifest import Manifest


class Ballot:
    """Carries a step of one job from its packs to its manifest; every rank makes the same calls.

    Args:
        directory: where the step is.
        collective: the ranks.
        keep: how many checkpoints to keep when a new one is there.
    """

    def __init__(self, directory: CheckpointDirectory, collective: Collective, keep: int) -> None:
        self._directory, self._collective, self._keep = directory, collective, keep

    def write(self, step_id: StepId, write: Callable[[], None]) -> Outcome:
        """Write on every rank; all learn how it went, from the votes where messages fail.

        A rank that fails votes, too: its part says why. Those that wait for a rank in vain vote in
        its place, so that it cannot come late: of all these votes the first one counts.

        Raises:
            SaveFailedError: a rank was not heard of in time.
        """

        def vote() -> None:
            try:
                write()
            except Exception as e:
                with contextlib.suppress(OSError, CheckpointError):
                    self._directory.put_failure(step_id, self._collective.rank, describe(e))
                raise

        try:
            return agree(self._collective, "written", vote)
        except CollectiveError as e:
            causes = self._directory.give_up(step_id, self._collective.world_size)
            lost = {self._collective.rank: describe(e)}
            raise SaveFailedError(step_id.step, causes or lost) from e

    def commit(self, step_id: StepId) -> Outcome:
        """Make the step exist, then delete what is no longer kept; on rank 0, the others wait.

        The result of rank 0 is the size of the checkpoint in bytes.

        Raises:
            CollectiveError: a rank was not heard of in time; the step is there all the same.
        """
        try:
            return agree(self._collective, "committed", lambda: self._publish(step_id))
        except CollectiveError:
            # Rank 0 may be gone. All have voted, and whoever sees all votes may publish.
            self._directory.commit(step_id, self._collective.world_size)
            raise

    def discard(self, step_id: StepId) -> None:
        """Delete a failed save; what cannot be deleted now, the next attempt clears away."""
        if self._collective.rank == 0:
            with contextlib.suppress(OSError):
                self._directory.delete(step_id)

    def _publish(self, step_id: StepId) -> int | None:
        if self._collective.rank != 0:
            return None
        manifest, warning = publish_step(
            self._directory, step_id, self._collective.world_size, self._keep
        )
        if warning is not None:
            warnings.warn(warning, RuntimeWarning, stacklevel=6)
        return manifest.size_bytes


def publish_step(
    directory: CheckpointDirectory, step_id: StepId, world_size: int, keep: int
) -> tuple[Manifest, str | None]:
    """Commit a step for which all ranks have voted, then delete what is no longer kept.

    Args:
        directory: where the step is.
        step_id: the step.
        world_size: how many ranks have voted.
        keep: how many checkpoints to keep.

    Returns:
        Its manifest; and what to warn of where older checkpoints could not be deleted.

    Raises:
        CheckpointError: as ``CheckpointDirectory.commit``.
        OSError: as the store reports it.
    """
    manifest = directory.commit(step_id, world_size)
    try:
        directory.retire(keep, step_id.generation)
        if not directory.has_lock:  # else it was done when the lock was taken
            directory.collect_garbage()
    except (OSError, EverstepError) as e:
        return manifest, (
            f"step {step_id.step} is saved, but older checkpoints could not be deleted: "
            f"{describe(e)}"
        )
    return manifest, None
