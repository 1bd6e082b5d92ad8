"""Counts bytes of all sources of a corpus, for one display of progress."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all). Text counts twice: to identify it, and to tokenize it."""


class Meter:
    """How much of ``total_bytes`` is done; it never goes beyond."""

    def __init__(self, total_bytes: int, progress: Progress | None) -> None:
        self._progress = progress
        self._total_bytes = max(1, total_bytes)  # sizes of remote files may be unknown
        self._done_bytes = 0

    def advance(self, size_bytes: int, was_read: bool) -> None:
        """``size_bytes`` more are dealt with; nothing is displayed for what was not read."""
        self._done_bytes = min(self._done_bytes + size_bytes, self._total_bytes)
        if was_read and self._progress is not None:
            self._progress(self._done_bytes, self._total_bytes)
