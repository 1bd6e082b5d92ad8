"""Batches assembled ahead of their use, in a thread, without changing what a run sees.

The thread is the only one that moves the stream while it runs. With every step's batches it hands
over the state that the stream had right after them, so that the state of the whole is always the
one behind the batches that were taken: what is prepared and not yet taken does not count.
"""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from everstep.trainer.data.stream import MicroBatch

JOIN_S = 5.0
"""Longest time that closing waits for a read in progress; the thread ends after it anyway."""


class BatchStream(Protocol):
    """Training batches of one rank, without end, at a position that can be saved."""

    @property
    def position(self) -> int:
        """Global samples consumed."""
        ...

    @property
    def samples_per_epoch(self) -> int:
        """Global samples after which the text begins again in another order."""
        ...

    def next_step(self) -> list[MicroBatch]:
        """This rank's micro batches of the next global batch; advances by that global batch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-able position, and what it is a position in."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved position; after an error nothing is changed."""
        ...


@contextlib.contextmanager
def prefetched(stream: BatchStream, steps: int) -> Iterator[BatchStream]:
    """``stream`` with the batches of up to ``steps`` steps assembled ahead; 0: itself.

    While the context is open, ``stream`` itself is not to be touched.
    """
    if steps == 0:
        yield stream
        return
    ahead = PrefetchedStream(stream, steps)
    try:
        yield ahead
    finally:
        ahead.close()


@dataclass(frozen=True)
class _Place:
    """Where a stream stands."""

    state: dict[str, Any]
    position: int


@dataclass(frozen=True)
class _Step:
    """The batches of a step, and where the stream stands behind them; or why there are none."""

    batches: list[MicroBatch]
    behind: _Place = _Place({}, 0)
    error: BaseException | None = None


class PrefetchedStream:
    """A ``BatchStream`` that gives what ``stream`` gives, from a thread that works ahead.

    An error of the stream is raised by the call that would have met it without a thread; the next
    call tries again. The thread starts with the first batch that is asked for, and after a fork
    the child starts one of its own. ``close`` ends it; the stream can be used again then.

    Args:
        stream: what to read; nobody else touches it until ``close``.
        steps: how many steps to be ahead at most, from 1.
    """

    def __init__(self, stream: BatchStream, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"steps={steps}: give 1 or more, or use the stream itself")
        self._stream = stream
        self._steps = steps
        self._taken = _place_of(stream)
        self._reader: _Reader | None = None
        self._pid = os.getpid()

    @property
    def position(self) -> int:
        """Global samples consumed; batches in preparation do not count."""
        return self._taken.position

    @property
    def samples_per_epoch(self) -> int:
        """See ``BatchStream``."""
        return self._stream.samples_per_epoch

    def next_step(self) -> list[MicroBatch]:
        """See ``BatchStream``; waits where the thread has nothing ready."""
        self._notice_fork()
        if self._reader is None:
            self._reader = _Reader(self._stream, self._steps)
        step = self._reader.take()
        if step.error is not None:
            self._reader = None  # the error was the last thing that it did
            raise step.error
        self._taken = step.behind
        return step.batches

    def state_dict(self) -> dict[str, Any]:
        """See ``BatchStream``; the state behind the batches that were taken."""
        return dict(self._taken.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``BatchStream``; forgets what was prepared."""
        self._rewind(wait_s=None)
        self._stream.load_state_dict(state)
        self._taken = _place_of(self._stream)

    def close(self) -> None:
        """End the thread and put the stream where its batches were taken; may be called twice."""
        self._rewind(wait_s=JOIN_S)

    def _rewind(self, wait_s: float | None) -> None:
        self._notice_fork()
        reader, self._reader = self._reader, None
        if reader is not None and reader.halt(wait_s):
            self._stream.load_state_dict(self._taken.state)

    def _notice_fork(self) -> None:
        """A forked child has neither the thread nor what it had prepared."""
        if self._pid != os.getpid():
            self._pid, self._reader = os.getpid(), None
            self._stream.load_state_dict(self._taken.state)


class _Reader:
    """A thread that reads a stream until it is halted or meets an error."""

    def __init__(self, stream: BatchStream, steps: int) -> None:
        self._stream = stream
        self._steps = steps
        self._ready: deque[_Step] = deque()
        self._changed = threading.Condition()
        self._halted = False
        self._thread = threading.Thread(target=self._read, name="everstep-prefetch", daemon=True)
        self._thread.start()

    def take(self) -> _Step:
        """The next step; waits for it."""
        with self._changed:
            while not self._ready:
                self._changed.wait()
            step = self._ready.popleft()
            self._changed.notify()
        return step

    def halt(self, wait_s: float | None) -> bool:
        """Read no more; True once the stream is free, False if it is still being read then."""
        with self._changed:
            self._halted = True
            self._changed.notify()
        self._thread.join(wait_s)
        return not self._thread.is_alive()

    def _read(self) -> None:
        while True:
            with self._changed:
                while len(self._ready) >= self._steps and not self._halted:
                    self._changed.wait()
                if self._halted:
                    return
            try:
                step = _Step(self._stream.next_step(), _place_of(self._stream))
            except BaseException as error:
                step = _Step([], error=error)
            with self._changed:
                self._ready.append(step)
                self._changed.notify()
            if step.error is not None:
                return


def _place_of(stream: BatchStream) -> _Place:
    return _Place(stream.state_dict(), stream.position)
