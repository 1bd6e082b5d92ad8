"""What of the ranks' logs a person sees: no traces, and each line once. Pure text handling.

Full traces stay in the logs. Lines that several ranks write are shown once, with the ranks that
wrote them.
"""

import re
import traceback
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

from everstep.cluster.lifecycle import name_ranks

_TRACE_BEGIN = "--- full trace ---"
_TRACE_END = "--- end of the trace ---"
HOLD_S = 0.3
"""How long a line waits for other ranks to write the same."""
_REMEMBERED_LINES = 5000

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")
_RANK_PREFIX = re.compile(r"^\[rank\s?\d+\]:? ?", re.IGNORECASE)
_VOLATILE = re.compile(r"^\[?[IWEF]\d{4} [\d:.]+|0x[0-9a-f]+|\bpid[ =:]*\d+", re.IGNORECASE)
_WARNING = re.compile(r"^\S+:\d+: \w*Warning: ")
_TRACE_HEAD = re.compile(r"^(\+ )?(Exception Group )?Traceback \(most recent call last\):")
_NATIVE_HEAD = re.compile(
    r"^(Fatal Python error: |(Current thread|Thread) 0x|Exception raised from |frame #\d+: )"
)
_NATIVE_BODY = re.compile(
    r"^(  File |  <no Python frame>|  Garbage-collecting|  \.\.\.|Current thread|Thread 0x|frame #|"
    r"Extension modules:|Python runtime state:|Binary file )"
)


def framed_trace(error: BaseException) -> str:
    """The full trace of an error for the rank's log, framed so that it is not shown elsewhere."""
    trace = "".join(traceback.format_exception(error)).rstrip("\n")
    return f"{_TRACE_BEGIN}\n{trace}\n{_TRACE_END}\n"


class TraceFilter:
    """Drops traces from the lines of one log; keeps the last line of a trace, which names it."""

    def __init__(self) -> None:
        self._inside: str | None = None

    def feed(self, raw_line: str) -> str | None:
        """The line as a person should see it, or None."""
        line = _ESCAPES.sub("", raw_line.rpartition("\r")[2] or raw_line).rstrip()
        text = _RANK_PREFIX.sub("", line)
        if self._inside == "frame":
            if text == _TRACE_END:
                self._inside = None
            return None
        if text == _TRACE_BEGIN:
            self._inside = "frame"
            return None
        if _TRACE_HEAD.match(text):
            self._inside = "trace"
            return None
        if self._inside == "trace":
            if not text or text.startswith((" ", "+", "|")):
                return None
            self._inside = None
            return line
        if self._inside == "native" and (not text or _NATIVE_BODY.match(text)):
            return None
        if _NATIVE_HEAD.match(text):
            self._inside = "native"
            return line if text.startswith("Fatal") else None
        after_warning = self._inside == "warning"
        self._inside = "warning" if _WARNING.match(text) else None
        if after_warning and text.startswith("  "):
            return None  # the source line that caused the warning
        return line or None


@dataclass
class _Waiting:
    text: str
    since_s: float
    ranks: set[int] = field(default_factory=set)


class LineMerger:
    """Shows a line as often as the rank that wrote it most often, and says who wrote it.

    Lines are the same where they differ in ranks, process ids, addresses and times only. Warnings
    are shown once, however often they come.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._counts: OrderedDict[str, dict[int, int]] = OrderedDict()
        self._taken: dict[str, int] = {}
        self._waiting: OrderedDict[Hashable, _Waiting] = OrderedDict()

    def add(self, rank: int, line: str, now_s: float) -> None:
        """A rank wrote a line."""
        key = _VOLATILE.sub("", _RANK_PREFIX.sub("", line))
        counts = self._counts.setdefault(key, {})
        self._counts.move_to_end(key)
        nth = 1 if _WARNING.match(line) else counts.get(rank, 0) + 1
        counts[rank] = nth
        if nth > self._taken.get(key, 0):
            self._taken[key] = nth
            self._waiting[key, nth] = _Waiting(_RANK_PREFIX.sub("", line), now_s)
        if (key, nth) in self._waiting:
            self._waiting[key, nth].ranks.add(rank)
        while len(self._counts) > _REMEMBERED_LINES:
            oldest, _ = self._counts.popitem(last=False)
            self._taken.pop(oldest, None)

    def take(self, now_s: float) -> list[str]:
        """Lines that have waited long enough, or that every rank has written, in their order."""
        ready = []
        while self._waiting:
            waiting = next(iter(self._waiting.values()))
            if now_s - waiting.since_s < HOLD_S and len(waiting.ranks) < self._world_size:
                break
            self._waiting.popitem(last=False)
            ready.append(self._labelled(waiting))
        return ready

    def _labelled(self, waiting: _Waiting) -> str:
        if self._world_size == 1 or min(waiting.ranks) < 0:
            return waiting.text
        everyone = len(waiting.ranks) == self._world_size
        who = "all ranks" if everyone else name_ranks(tuple(waiting.ranks))
        return f"[{who}] {waiting.text}"
