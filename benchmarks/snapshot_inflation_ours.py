"""Everstep in the snapshot benchmark: ``Checkpointer.save`` after every step."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from snapshot_inflation_turns import KEEPER, RANKS
from snapshot_inflation_way import Way

from everstep import Checkpointer, State
from everstep.checkpoint.keeper import control
from everstep.checkpoint.keeper.client import KeeperMemory
from everstep.checkpoint.snapshots.arena import ArenaMemory
from everstep.checkpoint.snapshots.handle import SaveHandle
from everstep.checkpoint.snapshots.memory import SlotMemory
from everstep.checkpoint.torch_collective import ProcessGroupCollective

_JOB = "benchmark"
_LINGER_S = 60.0


class Snapshots(Way):
    """Captured at every step, into memory that outlives the trainer; checksummed and sealed."""

    durable_every: int | None = None

    def before_training(self) -> None:
        """Start the keeper, as a launcher does; make the Checkpointer of a run."""
        self._keepers: Path | None = None
        if self.place.slots == KEEPER:
            self._keepers = self.place.memory / "keepers"
            if self.place.rank == 0:
                control.start(_JOB, place=self._keepers, linger_s=_LINGER_S)
            dist.barrier()
        self._checkpointer = Checkpointer(
            self.place.disk / "checkpoints",
            collective=ProcessGroupCollective(),
            durable_every=self.durable_every,
            memory=self._slots(),
        )
        self._state = State(model=self.training.model, optimizer=self.training.optimizer)
        self._handles: list[SaveHandle] = []

    def _slots(self) -> SlotMemory:
        if self._keepers is None:
            return ArenaMemory()
        return KeeperMemory(_JOB, rank=self.place.rank, world_size=RANKS, place=self._keepers)

    def after_step(self, step: int) -> None:
        """Save; the Checkpointer's own hook holds up the update."""
        self._handles.append(self._checkpointer.save(step, self._state))

    def drain(self) -> None:
        """Until what is to be durable is."""
        for handle in self._handles:
            handle.durable.exception()

    def close(self) -> None:
        """Wait for what is being written; end the keeper."""
        self._checkpointer.close()
        if self._keepers is not None:
            dist.barrier()
            if self.place.rank == 0:
                control.stop(_JOB, place=self._keepers, now=True)

    def helpers(self) -> Sequence[int]:
        """The keeper."""
        if self._keepers is None or self.place.rank:
            return ()
        found = control.status(_JOB, place=self._keepers)
        return () if found is None else (found["pid"],)

    def skipped(self) -> int:
        """Snapshots that were not captured."""
        return self._checkpointer.report().skipped

    def details(self) -> dict[str, Any]:
        """The Checkpointer's own report."""
        return asdict(self._checkpointer.report())


class DurableSnapshots(Snapshots):
    """The same, with every fifth written to the disk beside the training."""

    durable_every = 5
