"""A client's connection to its keeper, which is made again when the keeper was restarted."""

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from everstep.checkpoint.errors import EverstepError, KeeperError
from everstep.checkpoint.keeper.carried import decode_error
from everstep.checkpoint.keeper.place import KeeperPlace, is_absence
from everstep.checkpoint.keeper.wire import Channel, Frame, WireError, close_all

Ask = Callable[[Mapping[str, Any], Sequence[int]], dict[str, Any]]
"""One request while a connection is being made; gives the result."""
_FIRST_PAUSE_S = 0.01
_LONGEST_PAUSE_S = 0.5


class Reply:
    """What a keeper has answered."""

    def __init__(self, result: dict[str, Any], fds: tuple[int, ...]) -> None:
        self.result = result
        self.fds = fds
        """Belong to whoever has asked."""


class _Pending:
    def __init__(self, body: dict[str, Any], fds: Sequence[int]) -> None:
        self.body = body
        self.fds = tuple(os.dup(fd) for fd in fds)
        self.future: Future[Reply] = Future()


class Link:
    """Requests and their answers, over one connection at a time. Thread-safe.

    Every request may be sent twice: when the connection is lost before the answer, it is sent
    again over the next one. Requests fail with KeeperError when there was none for ``timeout_s``.

    Args:
        place: where the keeper is.
        greet: says who this is, at the beginning of every connection, given what asks.
        timeout_s: how long to wait for a keeper, and for an answer.

    Raises:
        KeeperError: there is no keeper, or it refuses this client.
    """

    def __init__(self, place: KeeperPlace, greet: Callable[[Ask], None], timeout_s: float) -> None:
        self._place, self._greet, self._timeout_s = place, greet, timeout_s
        self._lock = threading.Lock()
        self._pending: dict[int, _Pending] = {}
        self._last_number = 0
        self._closing = threading.Event()
        self._refused: KeeperError | None = None
        self._channel: Channel | None = self._connect()
        self._reader = threading.Thread(target=self._run, name="keeper-link", daemon=True)
        self._reader.start()

    def submit(self, do: str, fds: Sequence[int] = (), **facts: Any) -> "Future[Reply]":
        """Ask for something; the caller keeps its descriptors. Does not wait for the answer."""
        with self._lock:
            self._last_number += 1
            number = self._last_number
            pending = _Pending({"id": number, "do": do, **facts}, fds)
            if self._refused is not None or self._closing.is_set():
                close_all(pending.fds)
                pending.future.set_exception(self._refused or self._no_keeper("is closed"))
                return pending.future
            self._pending[number] = pending
            if self._channel is not None:
                self._send(self._channel, pending)
        return pending.future

    def call(
        self, do: str, fds: Sequence[int] = (), *, timeout_s: float | None = None, **facts: Any
    ) -> Reply:
        """Ask for something and wait for it.

        Raises:
            KeeperError: there is no answer in time.
            EverstepError: what the keeper has answered.
        """
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        future = self.submit(do, fds, **facts)
        try:
            return future.result(limit_s)
        except FutureTimeoutError:
            if future.cancel():  # an answer that comes later is dropped
                raise self._no_keeper(f"has not answered {do!r} within {limit_s:g} s") from None
            return future.result()

    def close(self) -> None:
        """End the connection; may be called twice."""
        self._closing.set()
        with self._lock:
            if self._channel is not None:
                self._channel.shut_down()
        if self._reader is not threading.current_thread():
            self._reader.join()
        self._fail(self._no_keeper("is no longer connected to: this client was closed"))

    # The thread that reads

    def _run(self) -> None:
        while not self._closing.is_set() and self._refused is None:
            channel = self._channel or self._connect_again()
            if channel is None:
                return
            with contextlib.suppress(EOFError, OSError, WireError):
                while True:
                    for frame in channel.receive():
                        self._take(frame)
            with self._lock:
                self._channel = None
            channel.close()

    def _take(self, frame: Frame) -> None:
        if frame.body.get("event") == "superseded":
            self._refused = KeeperError(
                "another process has taken the place of this rank at the keeper of job "
                f"{self._place.job}: end this one"
            )
            self._fail(self._refused)
            return
        with self._lock:
            pending = self._pending.pop(frame.body.get("id", 0), None)
        if pending is None:
            frame.close()
            return
        close_all(pending.fds)
        if not pending.future.set_running_or_notify_cancel():
            frame.close()
        elif "error" in frame.body:
            frame.close()
            pending.future.set_exception(decode_error(frame.body["error"]))
        else:
            pending.future.set_result(Reply(frame.body["result"], frame.fds))

    def _connect_again(self) -> Channel | None:
        """The next connection, over which everything is asked again that is not answered yet."""
        lost_at_s, pause_s = time.monotonic(), _FIRST_PAUSE_S
        while not self._closing.wait(pause_s):
            try:
                channel = self._connect()
            except (EverstepError, OSError) as error:
                if time.monotonic() - lost_at_s > self._timeout_s:
                    self._fail(KeeperError(str(error)))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            with self._lock:
                self._channel = channel
                for number in sorted(self._pending):
                    self._send(channel, self._pending[number])
            return channel
        return None

    def _connect(self) -> Channel:
        try:
            channel = Channel(self._place.connect())
        except OSError as error:
            if is_absence(error):
                raise self._no_keeper("is not there") from None
            raise self._no_keeper(f"cannot be reached ({error})") from None
        try:
            self._greet(lambda body, fds: self._ask(channel, body, fds))
        except (EOFError, OSError, WireError) as error:
            channel.close()
            raise self._no_keeper(f"ended while connecting ({type(error).__name__})") from None
        except BaseException:
            channel.close()
            raise
        return channel

    def _ask(self, channel: Channel, body: Mapping[str, Any], fds: Sequence[int]) -> dict[str, Any]:
        deadline_s = time.monotonic() + self._timeout_s
        channel.send({"id": 0, **body}, fds)
        poll = select.poll()
        poll.register(channel, select.POLLIN)
        while poll.poll(1000 * max(0.0, deadline_s - time.monotonic())):
            for frame in channel.receive():
                frame.close()
                if "error" in frame.body:
                    raise decode_error(frame.body["error"])
                if "result" in frame.body:
                    result: dict[str, Any] = frame.body["result"]
                    return result
        raise self._no_keeper(f"has not answered within {self._timeout_s:g} s")

    def _send(self, channel: Channel, pending: _Pending) -> None:
        try:
            channel.send(pending.body, pending.fds)
        except (OSError, WireError):
            channel.shut_down()  # the reader notices, and connects again

    def _fail(self, error: KeeperError) -> None:
        """Answer everything that is pending with an error."""
        with self._lock:
            pending = list(self._pending.values())
            self._pending.clear()
        for each in pending:
            close_all(each.fds)
            if each.future.set_running_or_notify_cancel():
                each.future.set_exception(error)

    def _no_keeper(self, what: str) -> KeeperError:
        place, job = self._place, self._place.job
        return KeeperError(
            f"the keeper of job {job} in {place.path} {what}: see {place.log}, and start it with "
            f"'everstep keeper start --job {job} --place {place.root}'"
        )

    def forget(self) -> None:
        """In a child that was forked: the connection, and what is asked, are its parent's."""
        self._lock = threading.Lock()  # a thread that is not here may hold the other one
        self._closing.set()
        if self._channel is not None:
            self._channel.close()
        for each in self._pending.values():
            close_all(each.fds)
        self._pending.clear()
