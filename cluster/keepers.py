"""The keepers of a run: which there are, and how each is started and ended on its node.

A keeper outlives the ranks and the command (``checkpoint/keeper``). After a failure it stays for
``checkpoint.keeper_linger_s``, so that the same command finds its snapshots; a run that ends as it
should ends its keepers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everstep.checkpoint.errors import EverstepError
from everstep.checkpoint.keeper import control
from everstep.checkpoint.keeper.place import jobs_in
from everstep.cluster.driver import Seat
from everstep.trainer.checkpoint_place import checkpoint_place, keeper_job
from everstep.trainer.config import RunConfig

KeepFor = Callable[[str], object]
"""Sees to it that the keeper of this name runs on this node."""


@dataclass(frozen=True, kw_only=True)
class KeeperOptions:
    """How keepers are started; plain data, so that it can be sent as JSON."""

    budget_bytes: int | None
    linger_s: float
    interface: str | None
    """For the data plane; None: there is none."""

    def keep(self, job: str) -> None:
        """Start a keeper on this node, unless it runs. Raises KeeperError."""
        control.start(
            job,
            budget_bytes=self.budget_bytes,
            linger_s=self.linger_s,
            interface=self.interface,
        )


NO_KEEPERS = KeeperOptions(budget_bytes=None, linger_s=0.0, interface=None)
"""For ranks that have none."""


def base_job(config: RunConfig, run_dir: Path) -> str | None:
    """What names of this run's keepers begin with; None where the run has none."""
    if config.checkpoint.memory != "keeper":
        return None
    return keeper_job(checkpoint_place(run_dir, config.checkpoint.directory))


def keeper_options(config: RunConfig) -> KeeperOptions:
    """How this run's keepers are started."""
    checkpoint = config.checkpoint
    return KeeperOptions(
        budget_bytes=checkpoint.memory_budget_bytes,
        linger_s=checkpoint.keeper_linger_s,
        interface=checkpoint.keeper_interface,
    )


def keeper_names(base: str | None, seats: Sequence[Seat]) -> list[str | None]:
    """The keeper of each seat: one per host, or one per node where a host pretends to be several.

    Nodes that share a host are counted in the order of ranks, and not named after themselves: the
    next start, whose nodes have other names, finds the keepers of this one.
    """
    if base is None:
        return [None] * len(seats)
    nodes: dict[str, list[str | None]] = {}
    for seat in seats:
        known = nodes.setdefault(seat.host, [])
        if seat.node not in known:
            known.append(seat.node)
    return [
        base if len(nodes[seat.host]) == 1 else f"{base}-n{nodes[seat.host].index(seat.node)}"
        for seat in seats
    ]


def keeper_runs(job: str) -> bool:
    """Whether this node has the keeper of a job, whoever has started it. Raises KeeperError."""
    return control.status(job) is not None


def end_keepers(jobs: Sequence[str], timeout_s: float) -> list[str]:
    """End keepers of this node, which make durable what is not yet; what went wrong, if it did."""
    problems = []
    for job in jobs:
        try:
            control.stop(job, timeout_s=timeout_s)
        except (EverstepError, OSError) as error:
            problems.append(str(error))
    return problems


def run_status(config: RunConfig, run_dir: Path) -> list[Mapping[str, Any]]:
    """How the keepers of a run on this host are. Raises KeeperError."""
    base = base_job(config, run_dir)
    if base is None:
        return []
    found = (control.status(job) for job in jobs_in() if job == base or job.startswith(f"{base}-n"))
    return [each for each in found if each is not None]
