"""A training whose copies share its memory with it, driven by the controller under test."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from everstep.checkpoint.snapshots.pacing import Pacing, StepFacts, after_step


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the controller does not know."""

    snapshot_bytes: int = 10**9
    copy_bytes_per_s: float = 8e9
    """At full speed."""
    reached: float = 1.0
    """The part of a limit that the copier reaches."""
    slowdown: float = 0.3
    """Of compute while copies run at full speed."""
    steepness: float = 2.0
    """1: copies cost the same however fast; more: fast ones cost more."""
    noise: float = 0.0
    """Relative, of step times."""

    def speed(self, limit: float | None) -> float:
        """Bytes/s in the background under a limit."""
        full = self.copy_bytes_per_s
        return full if limit is None else min(full, limit * self.reached)

    def slower(self, speed: float) -> float:
        """What compute takes longer, relative, while copies run at a speed."""
        return float(self.slowdown * (speed / self.copy_bytes_per_s) ** self.steepness)


@dataclass(frozen=True)
class Simulated:
    """One step."""

    limit: float | None
    window_s: float
    copied_s: float | None
    """When the capture was complete; None: not before the fence."""
    stall_s: float
    inflation: float
    """Of the step, relative to one without copies."""


def simulate(
    machine: Machine,
    compute_s: Callable[[int], float],
    steps: int,
    pacing: Pacing,
    seed: int = 0,
) -> tuple[list[Simulated], Pacing]:
    """Train; ``compute_s`` is how long a step computes beside which nothing is copied."""
    chance, done = random.Random(seed), []
    for step in range(steps):
        alone_s = compute_s(step) * (1 + machine.noise * chance.uniform(-1, 1))
        limit = pacing.copy_bytes_per_s
        speed = machine.speed(limit)
        slower, copy_s = 1 + machine.slower(speed), machine.snapshot_bytes / speed
        complete = copy_s <= alone_s * slower
        window_s = copy_s + (alone_s - copy_s / slower) if complete else alone_s * slower
        background = machine.snapshot_bytes if complete else int(speed * window_s)
        stall_s = (machine.snapshot_bytes - background) / machine.copy_bytes_per_s
        inflation = (window_s + stall_s) / alone_s - 1
        done.append(Simulated(limit, window_s, copy_s if complete else None, stall_s, inflation))
        facts = StepFacts(
            window_s=window_s,
            snapshot_bytes=machine.snapshot_bytes,
            background_bytes=background,
            background_s=min(copy_s, window_s),
        )
        pacing = after_step(pacing, facts)
    return done, pacing


def floor(machine: Machine, compute_s: float) -> float:
    """The inflation of copies that take all the time that there is, and not more."""
    return machine.slower(min(machine.copy_bytes_per_s, machine.snapshot_bytes / compute_s))
