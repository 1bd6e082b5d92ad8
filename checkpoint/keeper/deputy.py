"""What a keeper leaves with its supervisor, so that the next one goes on where it was killed."""

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

from everstep.checkpoint.keeper.wire import Channel, WireError

Hold = tuple[str, dict[str, Any], Sequence[int]]
"""Key, facts, and descriptors."""


class Deputy:
    """The keeper's side of the connection to its supervisor.

    Descriptors and notes are sent before anybody can rely on them. Without a supervisor (its
    channel is None, or lost) notes are remembered, for the next one.

    Args:
        channel: to the supervisor.
    """

    def __init__(self, channel: Channel | None) -> None:
        self.channel = channel
        self.notes: dict[str, Any] = {}

    def inherit(self) -> list[tuple[str, dict[str, Any], list[int]]]:
        """What an earlier keeper has left; blocks until the supervisor has told everything.

        Raises:
            EOFError: the supervisor is gone.
            WireError: the supervisor is of another version.
        """
        held: list[tuple[str, dict[str, Any], list[int]]] = []
        while self.channel is not None:
            for frame in self.channel.receive():
                match frame.body:
                    case {"do": "held", "key": str(key), "meta": dict(meta)}:
                        held.append((key, meta, list(frame.fds)))
                    case {"do": "note", "key": str(key), "value": value}:
                        self.notes[key] = value
                    case {"do": "go"}:
                        return held
                    case _:
                        raise WireError("the supervisor says what is not understood")
        return held

    def hold(self, key: str, meta: dict[str, Any], fds: Sequence[int]) -> None:
        """Leave descriptors."""
        self._send({"do": "hold", "key": key, "meta": meta}, fds)

    def drop(self, key: str) -> None:
        """Take descriptors back."""
        self._send({"do": "drop", "key": key})

    def note(self, key: str, value: Any) -> None:
        """Leave a value that JSON can carry; None takes it back."""
        if self.notes.get(key) == value:
            return
        if value is None:
            del self.notes[key]
        else:
            self.notes[key] = value
        self._send({"do": "note", "key": key, "value": value})

    def noted(self, prefix: str) -> dict[str, Any]:
        """All notes whose keys begin like that, by the rest of their keys."""
        n = len(prefix)
        return {key[n:]: value for key, value in self.notes.items() if key.startswith(prefix)}

    def up(self) -> None:
        """This keeper serves, and handles signals."""
        self._send({"do": "up"})

    def end(self) -> None:
        """This keeper is about to end on purpose."""
        self._send({"do": "end"})

    def change(self, channel: Channel | None, holds: Iterable[Hold] = ()) -> None:
        """Another supervisor has taken the place of one that is gone: leave everything with it."""
        if self.channel is not None:
            self.channel.close()
        self.channel = channel
        for key, meta, fds in holds:
            self.hold(key, meta, fds)
        for key, value in list(self.notes.items()):
            self._send({"do": "note", "key": key, "value": value})

    def _send(self, body: dict[str, Any], fds: Sequence[int] = ()) -> None:
        if self.channel is not None:
            # a loss is noticed by the loop, which reads the channel
            with contextlib.suppress(OSError, WireError):
                self.channel.send(body, fds)


def restore(channel: Channel, holds: Iterable[Hold], notes: dict[str, Any]) -> None:
    """The supervisor's side of ``inherit``.

    Raises:
        OSError: the keeper is gone.
    """
    for key, meta, fds in holds:
        channel.send({"do": "held", "key": key, "meta": meta}, fds)
    for key, value in notes.items():
        channel.send({"do": "note", "key": key, "value": value})
    channel.send({"do": "go"})
