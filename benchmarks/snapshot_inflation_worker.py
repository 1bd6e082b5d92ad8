"""One rank of the snapshot benchmark: blocks of training steps with snapshots taken one way."""

import gc
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from snapshot_inflation_meter import (
    MainThread,
    begin_peak,
    cpu_s_of,
    own_cpu_s,
    peak,
    private_bytes_of,
    shared_bytes,
)
from snapshot_inflation_training import Training
from snapshot_inflation_turns import PLANS, Size
from snapshot_inflation_way import Place, Way
from snapshot_inflation_ways import WAYS

FIRST_STEPS = 3
"""Taken before anything is measured: they make the optimizer's state."""


FIRST_MEASURED = 100
"""The number that a block gives to the first of its snapshots that count: a multiple of any period.
"""
PEAK_STEPS = 4
"""Where work ends with the step, memory is measured over as many steps as in the blocks beside it:
the peak of more steps is higher, whatever they do."""


class Worker:
    """The training of one rank, which goes on from block to block."""

    def __init__(self, rank: int, size: Size, adamw: str, slots: str) -> None:
        warnings.simplefilter("ignore")  # peers' advice for training jobs
        self._rank, self._slots = rank, slots
        self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=10))
        self._training = Training(rank, size, adamw)
        for _ in range(FIRST_STEPS):
            self._training.step()

    def facts(self) -> dict[str, Any]:
        """What is trained."""
        return {
            "parameters": sum(p.numel() for p in self._training.model.parameters()),
            "state_bytes": self._training.state_bytes,
            "tensors": len(self._training.local_tensors),
        }

    def block(self, name: str, disk: Path, memory: Path) -> dict[str, Any]:
        """Train with snapshots taken one way; what that took of this rank, per measured step."""
        plan, training = PLANS[name], self._training
        gc.collect()
        begin_peak()
        shared_before_bytes = shared_bytes()
        dist.barrier()
        place = Place(
            rank=self._rank, disk=disk, memory=memory, group=self._group, slots=self._slots
        )
        way, main_thread = WAYS[name](training, place), MainThread()
        way.before_training()
        hooks = [
            training.optimizer.register_step_pre_hook(lambda *_: main_thread.fence_begins()),
            training.optimizer.register_step_pre_hook(lambda *_: way.fence()),
        ]
        step_s: list[float] = []
        cpu_s: list[float] = []
        helpers_cpu_s: list[float] = []
        skipped = 0
        saved = FIRST_MEASURED - plan.warm_up
        held_bytes = (0, 0)
        for number in range(plan.warm_up + plan.measured):
            if number == plan.warm_up:
                dist.barrier()
                skipped = way.skipped()
            before_helpers_s, before_s = cpu_s_of(way.helpers()), own_cpu_s()
            began_s = time.monotonic()
            with main_thread.saving():
                if number < plan.warm_up or plan.takes(number - plan.warm_up):
                    way.after_step(saved)
                    saved += 1
            if number == 0:  # a way may bring a hook of its own with its first snapshot
                hooks.append(
                    training.optimizer.register_step_pre_hook(lambda *_: main_thread.fence_ends())
                )
            training.step()
            step_s.append(time.monotonic() - began_s)
            cpu_s.append(own_cpu_s() - before_s)
            helpers_cpu_s.append(cpu_s_of(way.helpers()) - before_helpers_s)
            if number < plan.warm_up and plan.rests:
                way.drain()
            if not plan.paired or number < PEAK_STEPS:
                held_bytes = peak()
        found = {
            "step_s": step_s[plan.warm_up :],
            "cpu_s": cpu_s[plan.warm_up :],
            "helpers_cpu_s": helpers_cpu_s[plan.warm_up :],
            "skipped": way.skipped() - skipped,
            **main_thread.last(plan.measured),
        }
        for hook in hooks:
            hook.remove()
        found |= self._held(way, held_bytes, shared_before_bytes)
        way.close()
        return found | {"details": way.details()}

    def _held(
        self, way: Way, held_bytes: tuple[int, int], shared_before_bytes: int
    ) -> dict[str, int]:
        """Memory of a block; at its end, while nothing has been let go of on any rank."""
        dist.barrier()
        peak_bytes, mapped_bytes = held_bytes
        held = {
            "peak_bytes": peak_bytes,
            "mapped_shared_bytes": mapped_bytes,
            "shared_bytes": max(0, shared_bytes() - shared_before_bytes),
            "helpers_bytes": private_bytes_of(way.helpers()),
        }
        dist.barrier()
        return held
