"""What a launcher tells one rank: plain data, so that any launcher can send it anywhere."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Report = dict[str, Any]
"""A JSON-able message of a rank to its launcher: ``{"kind": ..., "rank": ..., ...}``."""

Reporter = Callable[[Report], None]
"""Sends a report; never raises because the receiver is gone."""

EXIT_DONE = 0
"""Exit code of a rank that did all steps."""
EXIT_STOPPED = 75
"""Exit code of a rank that stopped on request, its state saved (EX_TEMPFAIL of sysexits.h)."""

StopRequested = Callable[[], bool]
"""True once somebody asked this rank to stop after the current step."""


@dataclass(frozen=True, kw_only=True)
class RankSpec:
    """One rank of one attempt to run a job."""

    config_yaml: str
    """The resolved configuration, as text."""
    run_dir: str
    """Directory that everything of this run is written to."""
    rank: int
    world_size: int
    local_rank: int
    """Rank among those on this host; selects the GPU."""
    local_world_size: int
    attempt: int
    """Counts the starts of this job by this launcher, from 0."""
    resume: str
    """'auto', 'never', or the step to resume from."""
    store: str | None
    """'host:port' of the launcher's TCPStore; None: rendezvous from the environment (env://)."""
    keeper: str | None = None
    """Name of the keeper on this rank's node that holds its snapshots."""
    device: str | None = None
    """The device that the launcher has reserved: 'cpu' or 'cuda:0'; None: by what is seen here."""
    launch: Sequence[str] = ()
    """Options that start this run again in the same way, such as ('--launcher', 'local')."""
