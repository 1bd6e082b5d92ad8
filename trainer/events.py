"""What happened in a run, one JSON object per line: for people and programs that come later."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

TOO_FREQUENT = ("step", "transfer")
"""Kinds of reports that are no events: they are shown while they are new."""


class EventLog:
    """Appends events to a file; every line is handed to the system at once.

    A line has ``time`` (seconds since the epoch), ``kind``, and whatever facts belong to it.
    Numbers that JSON does not have (NaN, infinities) are written as strings. A log that cannot be
    written (a full disk) never stops the run that it describes: ``failure`` says why, once.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._fd = -1
        self.failure: str | None = None
        """Why events are missing from the file; None as long as all were written."""
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._torn = _ends_inside_line(self._fd)
        except OSError as error:
            self._note(error)

    def append(self, kind: str, **facts: Any) -> None:
        """Write one event."""
        if self._fd < 0:
            return
        event = {"time": round(self._clock(), 3), "kind": kind, **facts}
        line = json.dumps(_json_able(event), default=str, allow_nan=False) + "\n"
        data = ("\n" * self._torn + line).encode()
        try:
            written = os.write(self._fd, data)
            self._torn = written < len(data)
        except OSError as error:
            self._note(error)

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _note(self, error: OSError) -> None:
        if self.failure is None:
            self.failure = f"events are missing from {self._path}: {error.strerror or error}"


def _ends_inside_line(fd: int) -> bool:
    """Whether a writer was killed in the middle of the last line."""
    size_bytes = os.fstat(fd).st_size
    return size_bytes > 0 and os.pread(fd, 1, size_bytes - 1) != b"\n"


def _json_able(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _json_able(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_able(item) for item in value]
    return value
