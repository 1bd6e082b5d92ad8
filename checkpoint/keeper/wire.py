"""Messages between a keeper and its clients on one host: JSON, with descriptors beside it.

A frame on a Unix stream socket::

    magic "evk1" | uint32 bytes of the body | uint8 descriptors | body: a JSON object

The descriptors travel with the first bytes of their frame (SCM_RIGHTS). Both sides are bounded: a
frame has at most ``MAX_BODY_BYTES`` and ``MAX_DESCRIPTORS``, and what a peer does not read is kept
up to ``MAX_UNSENT_BYTES``.
"""

import array
import contextlib
import json
import os
import socket
import struct
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_BODY_BYTES = 2**20
MAX_DESCRIPTORS = 250  # the kernel takes 253 at once
MAX_UNSENT_BYTES = 8 * MAX_BODY_BYTES
_HEAD = struct.Struct("<4sIB")
_MAGIC = b"evk1"
_READ_BYTES = 2**16


class WireError(Exception):
    """The peer sent what is no frame, or does not read; the connection is of no use any more."""


@dataclass(frozen=True)
class Frame:
    """A message that has arrived; its descriptors belong to whoever holds it."""

    body: dict[str, Any]
    fds: tuple[int, ...] = ()

    def close(self) -> None:
        """Close the descriptors."""
        close_all(self.fds)


class Channel:
    """Frames over a connected socket, which it owns; blocks where the socket does.

    One thread may send while another receives.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._incoming = bytearray()
        self._incoming_fds: deque[int] = deque()
        self._unsent: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        self._unsent_bytes = 0

    def fileno(self) -> int:
        """The descriptor of the socket; -1 when closed."""
        return self._socket.fileno()

    @property
    def unsent(self) -> bool:
        """True while something waits to be sent."""
        return bool(self._unsent)

    def send(self, body: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
        """Queue a frame and send what can be sent; the caller keeps its descriptors.

        Raises:
            WireError: the frame is too large, or the peer has not read for long.
            OSError: the connection is lost.
        """
        data = json.dumps(body, separators=(",", ":")).encode()
        if len(data) > MAX_BODY_BYTES or len(fds) > MAX_DESCRIPTORS:
            raise WireError(
                f"a frame of {len(data)} bytes and {len(fds)} descriptors is too large to send"
            )
        if self._unsent_bytes > MAX_UNSENT_BYTES:
            raise WireError(f"the peer does not read: {self._unsent_bytes} bytes wait for it")
        frame = _HEAD.pack(_MAGIC, len(data), len(fds)) + data
        self._unsent.append((memoryview(frame), tuple(os.dup(fd) for fd in fds)))
        self._unsent_bytes += len(frame)
        self.flush()

    def flush(self) -> None:
        """Send what can be sent without waiting (a blocking socket: everything).

        Raises:
            OSError: the connection is lost.
        """
        while self._unsent:
            data, fds = self._unsent[0]
            ancillary = (
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            )
            try:
                sent = self._socket.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            close_all(fds)
            self._unsent_bytes -= sent
            if sent == len(data):
                self._unsent.popleft()
            else:
                self._unsent[0] = (data[sent:], ())

    def receive(self) -> list[Frame]:
        """Read once, and give the frames that are complete by it.

        Raises:
            EOFError: the peer has closed the connection.
            WireError: what came is no frame.
            OSError: the connection is lost.
        """
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                _READ_BYTES,
                socket.CMSG_SPACE(4 * MAX_DESCRIPTORS),
                socket.MSG_CMSG_CLOEXEC,
            )
        except BlockingIOError:
            return []
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                came = array.array("i")
                came.frombytes(content[: len(content) - len(content) % came.itemsize])
                self._incoming_fds.extend(came)
        if flags & socket.MSG_CTRUNC:
            raise WireError("descriptors were lost: too many files are open in this process")
        if not data:
            raise EOFError
        self._incoming += data
        return list(self._frames())

    def _frames(self) -> Iterable[Frame]:
        while len(self._incoming) >= _HEAD.size:
            magic, length, n_fds = _HEAD.unpack_from(self._incoming)
            if magic != _MAGIC or length > MAX_BODY_BYTES or n_fds > MAX_DESCRIPTORS:
                raise WireError("what came is no frame of a keeper")
            end = _HEAD.size + length
            if len(self._incoming) < end:
                break
            if len(self._incoming_fds) < n_fds:
                raise WireError("a frame came without its descriptors")
            try:
                body = json.loads(self._incoming[_HEAD.size : end])
            except (ValueError, RecursionError):
                raise WireError("a frame is not JSON") from None
            if not isinstance(body, dict):
                raise WireError("a frame is no JSON object")
            del self._incoming[:end]
            yield Frame(body, tuple(self._incoming_fds.popleft() for _ in range(n_fds)))
        if len(self._incoming_fds) > MAX_DESCRIPTORS:
            raise WireError("more descriptors came than a frame can have")

    def shut_down(self) -> None:
        """Wake whoever receives, here and at the other side."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket and every descriptor that is under way; may be called twice."""
        self._socket.close()
        close_all(self._incoming_fds)
        self._incoming_fds.clear()
        for _, fds in self._unsent:
            close_all(fds)
        self._unsent.clear()


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors, whatever happens."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
