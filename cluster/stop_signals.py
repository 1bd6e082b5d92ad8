"""Signals that ask a run to stop, collected for whoever decides what follows from them."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

from everstep.cluster.lifecycle import StopAsked

_Handler = Callable[[int, FrameType | None], Any] | int | None


class StopSignals:
    """While entered, SIGINT, SIGTERM and SIGHUP are collected instead of ending the process.

    SIGHUP stays ignored under nohup. Outside of the main thread, where Python allows no handlers,
    nothing is collected.
    """

    def __init__(self) -> None:
        self._asked: list[StopAsked] = []
        self._before: dict[signal.Signals, _Handler] = {}

    def take(self) -> list[StopAsked]:
        """What was asked since the last call."""
        asked, self._asked = self._asked, []
        return asked

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                before = signal.getsignal(signum)
                if signum is signal.SIGHUP and before is signal.SIG_IGN:
                    continue
                self._before[signum] = before
                signal.signal(signum, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._asked.append(stop_asked(signum))


def stop_asked(signum: int) -> StopAsked:
    """What a signal means: Ctrl-C again insists; schedulers repeat SIGTERM without meaning more."""
    if signum == signal.SIGINT:
        return StopAsked("Ctrl-C", insistent=True)
    return StopAsked(signal.Signals(signum).name, insistent=False)


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """A process started meanwhile is not hit by Ctrl-C before it can say what it does with it."""
    held = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
