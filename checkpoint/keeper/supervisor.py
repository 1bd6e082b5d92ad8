"""The process that outlives keepers: it holds their descriptors and starts the next one.

It does nothing else, imports little, and never touches the memory, so that nothing can hit it that
hits a keeper.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

from everstep.checkpoint.keeper.deputy import restore
from everstep.checkpoint.keeper.wire import Channel, Frame, WireError, close_all

MOST_FAILURES = 20
"""Keepers in a row that end as soon as they were started, until the supervisor gives up."""
MOST_FIRST_FAILURES = 2
"""The same, when none has ever served: there is nothing to lose, and somebody waits."""
_WELL_AFTER_S = 10.0
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 5.0


class Supervisor:
    """Runs keepers, one after the other, until one ends on purpose.

    Args:
        command: starts a keeper, given the descriptor of its end of a connection to this process.
        inherited: descriptors that a keeper inherits.
        log: takes a line for people.
    """

    def __init__(
        self,
        command: Callable[[int], Sequence[str]],
        inherited: Sequence[int],
        log: Callable[[str], None],
    ) -> None:
        self._command = command
        self._inherited = inherited
        self._log = log
        self._held: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {}
        self._notes: dict[str, Any] = {}
        self._keeper = 0
        self._is_child = False
        self._terminated = False
        self._has_served = False

    def terminate(self, *_: object) -> None:
        """Have the keeper make durable what is newest, and end; for handlers of signals."""
        self._terminated = True
        if self._keeper:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._keeper, signal.SIGTERM)

    def run(self, channel: Channel | None = None, keeper: int = 0) -> bool:
        """Serve; True when a keeper has ended on purpose, False when none can be started.

        Args:
            channel: to a keeper that is running, whose supervisor was killed; None: start one.
            keeper: its process.
        """
        failures, self._keeper = 0, keeper
        self._has_served = channel is not None
        while failures < (MOST_FAILURES if self._has_served else MOST_FIRST_FAILURES):
            began_s = time.monotonic()
            if channel is None:
                channel = self._start()
            ended = self._listen(channel)
            channel.close()
            channel = None
            self._reap()
            if ended:
                close_all(fd for _, fds in self._held.values() for fd in fds)
                return True
            if time.monotonic() - began_s > _WELL_AFTER_S:
                failures = 0
            self._log(f"the keeper is gone without having said so ({len(self._held)} held)")
            if failures:
                time.sleep(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**failures))
            failures += 1
        self._log("the keeper cannot be started: giving up")
        return False

    def _start(self) -> Channel:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            process = subprocess.Popen(
                self._command(theirs.fileno()),
                pass_fds=[theirs.fileno(), *self._inherited],
                stdin=subprocess.DEVNULL,
            )
        self._keeper, self._is_child = process.pid, True
        process.returncode = 0  # it is waited for here
        channel = Channel(ours)
        with contextlib.suppress(OSError):  # it died at once: noticed when listening
            holds = [(key, meta, fds) for key, (meta, fds) in self._held.items()]
            restore(channel, holds, self._notes)
        return channel

    def _listen(self, channel: Channel) -> bool:
        """Take what a keeper leaves until it is gone; True if it has ended on purpose."""
        ended = False
        while True:
            try:
                for frame in channel.receive():
                    ended = self._take(frame) or ended
            except (EOFError, OSError):
                return ended
            except WireError as error:
                self._log(f"what the keeper says is not understood: {error}")
                return ended

    def _take(self, frame: Frame) -> bool:
        match frame.body:
            case {"do": "hold", "key": str(key), "meta": dict(meta)}:
                self._drop(key)
                self._held[key] = (meta, frame.fds)
                return False
            case {"do": "drop", "key": str(key)}:
                self._drop(key)
            case {"do": "note", "key": str(key), "value": value}:
                if value is None:
                    self._notes.pop(key, None)
                else:
                    self._notes[key] = value
            case {"do": "up"}:
                self._has_served = True
                if self._terminated:
                    self.terminate()
            case {"do": "end"}:
                return True
        frame.close()
        return False

    def _drop(self, key: str) -> None:
        close_all(self._held.pop(key, ({}, ()))[1])

    def _reap(self) -> None:
        if self._is_child:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._keeper, 0)
        self._keeper, self._is_child = 0, False
