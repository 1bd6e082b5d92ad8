"""Saving and waiting: when it returns, the checkpoint is durable; nothing is kept in memory."""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from everstep.checkpoint.ballot import Ballot
from everstep.checkpoint.collective import Collective, agree
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.errors import SaveFailedError
from everstep.checkpoint.layout import Fragment
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.manifest import Part
from everstep.checkpoint.optimizer_parts import digest_values
from everstep.checkpoint.ownership import Ownership
from everstep.checkpoint.save_plan import SavePlan
from everstep.checkpoint.snapshots.handle import StepInfo
from everstep.checkpoint.state_capture import Place, capture
from everstep.checkpoint.step_keys import step_key
from everstep.checkpoint.torch_io import write_tensors
from everstep.checkpoint.torch_layout import LiveTensor
from everstep.checkpoint.torch_state import State


class DurableSave:
    """Saves one step after the other; every rank makes the same calls.

    Args:
        directory: where to.
        collective: the ranks.
        owner: the job's right to write there.
        place: of this rank.
        keep: how many checkpoints to keep.
        threads: copy threads of this rank.
    """

    def __init__(
        self,
        directory: CheckpointDirectory,
        collective: Collective,
        owner: Ownership,
        place: Place,
        *,
        keep: int,
        threads: int,
    ) -> None:
        self._directory, self._collective, self._owner = directory, collective, owner
        self._place, self._threads = place, threads
        self._attempt = os.urandom(4).hex()
        self._ballot = Ballot(directory, collective, keep)
        self._plan = SavePlan(collective)

    def save(
        self, step: int, state: State, on_bytes: Callable[[int], None] | None = None
    ) -> StepInfo:
        """Save the state after a step.

        Raises:
            SaveFailedError: some rank could not save; causes by rank, nothing of the step is kept.
            DirectoryInUseError: another job writes to the directory.
        """
        begun_s = time.monotonic()
        live: dict[Fragment, LiveTensor] = {}
        context: dict[str, Any] = {}

        def look() -> list[str]:
            found, told = self._capture(state)
            live.update(found)
            context.update(told)
            return [self._plan.digest(list(live)), digest_values(context.get("optimizer"))]

        captured = agree(self._collective, "captured", look)
        if captured.causes:
            raise SaveFailedError(step, captured.causes) from captured.error
        layouts, optimizers = zip(*captured.results, strict=True)
        self._plan.update(layouts)
        if optimizers.index(optimizers[self._collective.rank]) != self._collective.rank:
            context.pop("optimizer", None)  # an earlier rank tells the same
        step_id = StepId(self._owner.begin(step), step)
        if self._collective.rank == 0:
            context["lineage"] = self._owner.lineage()
        done = self._ballot.write(step_id, lambda: self._write(step_id, live, context, on_bytes))
        if not done.causes:
            done = self._ballot.commit(step_id)
        if done.causes:
            self._ballot.discard(step_id)
            raise SaveFailedError(step, done.causes) from done.error
        return StepInfo(
            step=step,
            generation=step_id.generation,
            path=self._directory.describe(step_id),
            size_bytes=done.results[0],
            duration_s=time.monotonic() - begun_s,
        )

    def _capture(self, state: State) -> tuple[dict[Fragment, LiveTensor], dict[str, Any]]:
        return capture(state, self._place)

    def _write(
        self,
        step_id: StepId,
        live: Mapping[Fragment, LiveTensor],
        context: dict[str, Any],
        on_bytes: Callable[[int], None] | None,
    ) -> None:
        plan = self._plan.pack()
        name = f"rank-{plan.rank:05d}-{self._attempt}.safetensors"
        key = f"{step_key(step_id)}/{name}"
        with self._directory.store.writer(key, plan.size_bytes) as out:
            record = write_tensors(out, name, plan, live, threads=self._threads, on_bytes=on_bytes)
        self._directory.put_part(
            Part(
                generation=step_id.generation,
                step=step_id.step,
                rank=plan.rank,
                world_size=self._collective.world_size,
                pack=record,
                fragments=plan.fragments,
                context=context,
            )
        )
