"""What snapshots are asked for, and what came of it (plain data)."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Interval:
    """How often a snapshot is made durable; whichever comes first."""

    steps: int | None = None
    """Every multiple of so many steps."""
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"durable_every={self.steps}: a number of steps, at least 1, or None")
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"durable_every_s={self.seconds}: more than 0 seconds, or None")

    @property
    def flushes(self) -> bool:
        """Whether there is one at all."""
        return self.steps is not None or self.seconds is not None


@dataclass(kw_only=True)
class SnapshotReport:
    """What has happened so far, on this rank."""

    taken: int = 0
    """Snapshots that were begun."""
    skipped: int = 0
    """Saves that were not captured, on any rank."""
    failed: int = 0
    """Snapshots that were begun here and did not come to their end."""
    last_skip: str | None = None
    """Why the last one was skipped."""
    waiting: int = 0
    """Snapshots that were copied before ``save`` returned, as no fence was known to hold."""
    save_s: float = 0.0
    """Time of the caller inside of ``save``."""
    stall_s: float = 0.0
    """Time of the caller before updates: helping with copies that were not complete."""
    copied_bytes: int = 0
    """Of all snapshots, what was copied in the background."""
    copy_bytes_per_s: float | None = None
    """How fast the last one was copied in the background, as far as it was."""
    snapshot_bytes: int = 0
    """Size of one snapshot of this rank."""
    reserved_bytes: int = 0
    """Memory of all slots of this rank."""
    newest_sealed: int | None = None
    newest_durable: int | None = None
    flushes: int = 0
    """Snapshots that were made durable."""
    flushes_failed: int = 0
    last_flush_s: float | None = None
    last_flush_error: str | None = None
