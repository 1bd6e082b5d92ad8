"""Errors that everstep raises on purpose.

Every message is one sentence for a person: what was found, what was expected, the way out.
All facts are kept in ``args``, so that an error survives pickling between processes.
"""

from collections.abc import Mapping
from pathlib import Path


class EverstepError(Exception):
    """Base of every deliberate error; the command line prints its message without a traceback."""


class CheckpointError(EverstepError):
    """Base of everything that can go wrong with a checkpoint."""


class DirectoryInUseError(EverstepError):
    """Another process holds the lock of a directory."""

    def __init__(self, directory: str, holder: str) -> None:
        super().__init__(directory, holder)
        self.directory, self.holder = directory, holder

    def __str__(self) -> str:
        return (
            f"{self.directory} is in use by another job ({self.holder}): wait until it has ended, "
            "or choose another directory"
        )


class LayoutError(CheckpointError):
    """A tensor is laid out over the ranks in a way that cannot be saved."""


class StateError(CheckpointError):
    """A state holds something that a checkpoint cannot carry."""


class StateMismatchError(CheckpointError):
    """The state to load into and the checkpoint do not hold the same tensors."""

    def __init__(self, where: str, differences: list[str]) -> None:
        super().__init__(where, differences)
        self.where, self.differences = where, differences

    def __str__(self) -> str:
        shown = "; ".join(self.differences[:5])
        more = len(self.differences) - 5
        model_fits = not any("'model." in difference for difference in self.differences)
        return (
            f"{self.where} does not fit this run: {shown}"
            + (f"; and {more} more" if more > 0 else "")
            + ": resume with the model and optimizer it was saved with, "
            + ("load the model alone (include=['model']), " if model_fits else "")
            + "or use another directory"
        )


IS_DAMAGED = "is damaged"


class DamagedError(CheckpointError):
    """Base of all damage found while reading: the file named is not what was written."""

    def __init__(self, path: Path | str, what: str) -> None:
        super().__init__(str(path), what)
        self.path, self.what = str(path), what

    def __str__(self) -> str:
        return f"{self.path} {IS_DAMAGED}: {self.what}"


class PackHeaderError(DamagedError):
    """The header or the checksum table of a pack is not what the manifest says."""


class PackTruncatedError(DamagedError):
    """A pack is missing or has another size than the manifest says."""


class BlockChecksumError(DamagedError):
    """A block of a pack does not have the checksum that was written with it."""

    def __init__(self, path: Path | str, block: int, expected: int, found: int) -> None:
        CheckpointError.__init__(self, str(path), block, expected, found)
        self.path, self.block, self.expected, self.found = str(path), block, expected, found
        self.what = f"block {block} has checksum {found:08x}, expected {expected:08x}"


class ManifestError(DamagedError):
    """A manifest, part or generation record cannot be decoded."""


class ManifestChecksumError(ManifestError):
    """A record does not have the checksum that it carries."""


class ManifestVersionError(ManifestError):
    """A record was written by a newer format version."""


class CoverageError(ManifestError):
    """The fragments of a tensor do not cover it exactly once."""


class StepNotFoundError(CheckpointError):
    """There is no committed checkpoint for the step asked for."""

    def __init__(self, directory: str, step: int, available: list[int]) -> None:
        super().__init__(directory, step, available)
        self.directory, self.step, self.available = directory, step, available

    def __str__(self) -> str:
        have = ", ".join(map(str, self.available[-10:])) or "none"
        return (
            f"{self.directory} has no checkpoint of step {self.step}; it has: {have}. "
            "Resume from one of these"
        )


class StepExistsError(CheckpointError):
    """The step was already saved by this generation."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path

    def __str__(self) -> str:
        return f"{self.path} exists: a step is saved once; skip it, or save under a later step"


class RankFailures(CheckpointError):
    """Base of operations that failed on some ranks; all ranks raise it with the same causes."""

    doing = "the operation"

    def __init__(self, step: int, causes: Mapping[int, str]) -> None:
        super().__init__(step, dict(causes))
        self.step, self.causes = step, dict(causes)

    def __str__(self) -> str:
        groups: dict[str, list[int]] = {}
        for rank, cause in sorted(self.causes.items()):
            groups.setdefault(cause, []).append(rank)
        text = "; ".join(
            f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {cause}"
            for cause, ranks in groups.items()
        )
        return f"{self.doing} step {self.step} failed: {text}{self.way_out()}"

    def way_out(self) -> str:
        """What the reader can do; empty where the causes say it."""
        return ""


class SaveFailedError(RankFailures):
    """A save was aborted on all ranks; earlier checkpoints are untouched."""

    doing = "saving"

    def way_out(self) -> str:
        return (
            ". Nothing of it was kept; earlier checkpoints are untouched: mend the cause (make "
            "room, give permission), and start the same run again"
        )


class LoadFailedError(RankFailures):
    """A load failed on some rank; the state being loaded into is not to be used."""

    doing = "loading"

    def __init__(
        self, step: int, causes: Mapping[int, str], others: list[int] | None = None
    ) -> None:
        CheckpointError.__init__(self, step, dict(causes), others)
        self.step, self.causes, self.others = step, dict(causes), others or []

    def way_out(self) -> str:
        if not self.others or not any(IS_DAMAGED in cause for cause in self.causes.values()):
            return ""  # another step would not help
        have = ", ".join(map(str, self.others[-5:]))
        return f". Other checkpoints of this run: {have}; resume from one with --resume STEP"


class CollectiveError(CheckpointError):
    """Ranks could not agree: a peer is gone, too late, or doing something else."""


class SlotMemoryError(CheckpointError):
    """There is no memory for snapshots."""


class KeeperError(CheckpointError):
    """The keeper of snapshots cannot be reached, or refuses."""


class SnapshotSkipped(CheckpointError):
    """A step was not captured, on any rank; the state of a handle that says so."""

    def __init__(self, step: int, why: str) -> None:
        super().__init__(step, why)
        self.step, self.why = step, why

    def __str__(self) -> str:
        return f"step {self.step} was not captured: {self.why}"


class NotRequested(CheckpointError):
    """Something that was waited for was not asked for."""
