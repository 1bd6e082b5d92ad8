"""A TCP proxy that passes on what a test lets it pass."""

import contextlib
import socket
import threading
from collections.abc import Callable
from types import TracebackType

Edit = Callable[[int, bytes], bytes | None]
"""From how many bytes the peer has sent before, and what it sends now, to what is passed on; None:
nothing any more, and the connection stays open."""


class TcpProxy:
    """Listens on loopback and connects each client to a target; a context manager.

    Args:
        target: 'host:port'.
        from_target: edits what the target sends.
    """

    def __init__(self, target: str, from_target: Edit = lambda at, data: data) -> None:
        host, _, port = target.rpartition(":")
        self._target, self._edit = (host, int(port)), from_target
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.seen = bytearray()
        """What targets have sent, on all connections."""
        self.asked = bytearray()
        """What clients have sent."""
        self._away = False
        self._start(self._accept)

    def __enter__(self) -> "TcpProxy":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for each in (self._listener, *self._sockets):
            each.close()

    def go_away(self) -> None:
        """End all connections, and every new one at once, until ``come_back``."""
        self._away = True
        for each in list(self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def come_back(self) -> None:
        """Pass on what comes again."""
        self._away = False

    def _start(self, run: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=run, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self._away:
                    client.close()
                    continue
                self._sockets.append(client)
                target = socket.create_connection(self._target)
                self._sockets.append(target)
                self._start(self._pass_on, client, target, self.asked, lambda at, data: data)
                self._start(self._pass_on, target, client, self.seen, self._edit)

    def _pass_on(
        self, source: socket.socket, sink: socket.socket, seen: bytearray, edit: Edit
    ) -> None:
        at = 0
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                seen += data
                passed = edit(at, data)
                at += len(data)
                if passed is None:
                    continue
                sink.sendall(passed)
            sink.shutdown(socket.SHUT_WR)
