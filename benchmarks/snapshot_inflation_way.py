"""What a way to take snapshots does around the steps of a training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from snapshot_inflation_training import Training


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank takes its snapshots during one block."""

    rank: int
    disk: Path
    """A new folder for all ranks, on the disk."""
    memory: Path
    """A new folder for all ranks, in tmpfs."""
    group: dist.ProcessGroup
    """Of all ranks, for what communicates behind the training's back."""
    slots: str
    """Where everstep's slots are: KEEPER or PROCESS."""


class Way:
    """One way, for the length of a block; this one takes no snapshots."""

    def __init__(self, training: Training, place: Place) -> None:
        self.training, self.place = training, place

    def before_training(self) -> None:
        """Get ready; not timed."""

    def after_step(self, step: int) -> None:
        """Take a snapshot of the state after a step; on the main thread."""

    def fence(self) -> None:
        """Runs before the optimizer changes the state; on the main thread."""

    def drain(self) -> None:
        """Wait for all that was begun; not timed."""

    def close(self) -> None:
        """Let go of everything; not timed."""

    def helpers(self) -> Sequence[int]:
        """Processes that work for it beside the ranks."""
        return ()

    def skipped(self) -> int:
        """How many snapshots it did not take, so far."""
        return 0

    def details(self) -> dict[str, Any]:
        """What else it has to tell, after ``close``."""
        return {}
