"""Follows the logs of all ranks and passes on what a person should see of them."""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from everstep.cluster.log_text import LineMerger, TraceFilter

BEFORE_RANKS = -1
"""Stands for the log of what happens before there are ranks; its lines get no label."""
_READ_BYTES = 1 << 18
MOST_LINES = 100
"""Lines shown per look at the logs; more are counted only."""


@dataclass
class _Log:
    path: Path
    offset_bytes: int
    partial: bytes = b""
    filter: TraceFilter = field(default_factory=TraceFilter)

    def read_lines(self, rest: bool) -> list[str]:
        """Complete new lines; with ``rest`` an unfinished last one too."""
        data = b""
        if _size_bytes(self.path) > self.offset_bytes:
            with contextlib.suppress(OSError), self.path.open("rb") as file:
                file.seek(self.offset_bytes)
                data = file.read(_READ_BYTES)
        self.offset_bytes += len(data)
        *lines, self.partial = (self.partial + data).split(b"\n")
        if rest and self.partial:
            lines.append(self.partial)
            self.partial = b""
        return [line.decode(errors="replace") for line in lines]


class LogTail:
    """New lines of the ranks' logs from now on; what is in them already is not shown again."""

    def __init__(self, logs: Mapping[int, Path], world_size: int) -> None:
        self._logs = {rank: _Log(path, _size_bytes(path)) for rank, path in logs.items()}
        self._merger = LineMerger(world_size)

    def take(self, now_s: float, *, rest: bool = False) -> list[str]:
        """Lines to show now; with ``rest`` everything that was written, waiting for nothing."""
        for rank, log in self._logs.items():
            while lines := log.read_lines(rest):
                for line in lines:
                    shown = log.filter.feed(line)
                    if shown is not None:
                        self._merger.add(rank, shown, now_s)
                if not rest:
                    break
        ready = self._merger.take(float("inf") if rest else now_s)
        if len(ready) <= MOST_LINES:
            return ready
        folder = next(iter(self._logs.values())).path.parent
        return [*ready[:MOST_LINES], f"... and {len(ready) - MOST_LINES} more lines in {folder}"]


def _size_bytes(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0  # not written yet, or gone with its disk
