"""What the controller asks of a place where ranks run, and what that place tells the controller.

Ranks run as processes of this host (``local_driver.py``) or as actors of a Ray cluster
(``ray_driver.py``); tests have a driver in memory. A contract suite
(``tests/contracts/test_driver.py``) runs against all of them.
"""

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from everstep.trainer.rank_spec import RankSpec, Report


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where one rank runs."""

    host: str
    local_rank: int
    """Rank among those of the same host."""
    local_world_size: int
    node: str | None = None
    """What the cluster calls the node (one host may pretend to be several); None = the host."""
    failure_domain: str | None = None
    """What fails together with this seat; None = the host."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the ranks of one attempt run, and where they meet."""

    seats: tuple[Seat, ...]
    """One per rank, in the order of ranks."""
    store: str | None
    """'host:port' of the rendezvous store."""
    device: str | None = None
    """The device of every rank, where the place decides it: 'cpu' or 'cuda:0'."""


@dataclass(frozen=True)
class Reported:
    """A rank sent a report."""

    rank: int
    report: Report


@dataclass(frozen=True, kw_only=True)
class RankExit:
    """A rank ended."""

    rank: int
    code: int
    """Exit code; -N when signal N killed it."""
    time_s: float
    """When its end was noticed, as seconds since the epoch."""
    why: str | None = None
    """What is known beyond the code, to follow 'rank N': 'was lost with its node ...'."""
    incurable: bool = False
    """Started again, it would end in the same way."""

    @property
    def signal_name(self) -> str | None:
        """'SIGKILL' and the like, where a signal killed the rank."""
        if self.code >= 0:
            return None
        try:
            return signal.Signals(-self.code).name
        except ValueError:
            return f"signal {-self.code}"


@dataclass(frozen=True)
class Broken:
    """The driver itself can no longer run ranks; the ``why`` is a sentence for a person."""

    why: str


DriverEvent = Reported | RankExit | Broken

Waiting = Callable[[str], None]
"""Shows what is waited for; called often. Raises PlacingAbandoned when nobody wants the place."""


class PlacingAbandoned(Exception):
    """The run was asked to stop while its ranks were still waiting for a place."""


def wait_silently(text: str) -> None:
    """A ``Waiting`` for callers that show nothing and never give up."""


class ClusterDriver(Protocol):
    """Starts ranks, passes on what they report, and ends them.

    Nothing blocks for longer than a moment, except ``place``, ``poll`` (its timeout) and ``close``.
    """

    def place(self, world_size: int, waiting: Waiting = wait_silently) -> Placement:
        """Decide where ranks run and begin to prepare that place.

        What takes longer than a moment calls ``waiting``. Raises LaunchError.
        """
        ...

    def start(self, specs: Sequence[RankSpec]) -> None:
        """Start all ranks of an attempt. Raises LaunchError."""
        ...

    def renew(self, waiting: Waiting = wait_silently) -> Placement:
        """Make the place ready for another ``start``, once the exits of all ranks were told.

        Nothing that the ranks started is left then. They may have to go elsewhere: the placement
        is the new one. What takes longer than a moment calls ``waiting``. Raises LaunchError.
        """
        ...

    def poll(self, timeout_s: float) -> list[DriverEvent]:
        """What happened since the last call; waits at most ``timeout_s`` for something to happen.

        Reports of one rank come in its order; its exit comes once, and last.
        """
        ...

    def end_keepers(self, timeout_s: float) -> list[str]:
        """End the keepers that hold snapshots of the ranks, once all ranks have ended.

        Returns what went wrong, as sentences; waits at most ``timeout_s`` for each.
        """
        ...

    def ask_stop(self) -> None:
        """Make ``should_stop()`` true on every rank that is still there."""
        ...

    def dump_stacks(self) -> None:
        """Have every rank write the stacks of its threads to its log, where the place can."""
        ...

    def kill(self) -> None:
        """End all ranks at once, without their cooperation; their exits still come through poll."""
        ...

    def close(self) -> None:
        """End whatever is left and wait until it is gone; may be called twice."""
        ...
