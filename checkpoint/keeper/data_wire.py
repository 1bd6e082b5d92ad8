"""What readers and keepers send each other over TCP once both have proved who they are.

::

    request   kind u32, rank u32, timeout u32 in ms, generation u64, step u64, offset u64,
              length u64, CRC-32C u32 of all that
    frame     kind u32, length u32, CRC-32C u32 of both and of the payload | payload

Integers are little-endian. A request to list is answered by one frame with the slots that are
sealed, each as rank u32, generation u64, step u64. A request to read is answered by the bytes, in
frames of ``BLOCK_BYTES``, the last may be shorter. Instead of the first frame a refusal may come,
with a sentence. All that is of any size has a bound, and every wait a deadline, which is a time of
``time.monotonic``.
"""

import contextlib
import socket
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass

from everstep.checkpoint.kernels import crc32c
from everstep.checkpoint.lineage import StepId

BLOCK_BYTES = 2**20
LIST, READ = 1, 2
DATA, REFUSED, GONE = 1, 2, 3
_REQUEST = struct.Struct("<IIIQQQQ")
_FRAME = struct.Struct("<II")
_CRC = struct.Struct("<I")
_SLOT = struct.Struct("<IQQ")
_SENTENCE_BYTES = 1000
_MAX_TIMEOUT_MS = 2**32 - 1
REQUEST_BYTES = _REQUEST.size + _CRC.size

_NO_STEP = StepId(0, 0)

SlotName = tuple[int, StepId]
"""The rank whose snapshot a slot holds, and of which step."""


class WireError(Exception):
    """What arrived is not what can come here."""


class RefusedError(Exception):
    """The peer answered with a sentence instead."""

    def __init__(self, sentence: str, *, gone: bool) -> None:
        super().__init__(sentence)
        self.gone = gone
        """Whether it just has no such slot (any more)."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a reader asks for."""

    kind: int
    """``LIST`` or ``READ``."""
    timeout_s: float
    """How long it waits for each frame of the answer."""
    rank: int = 0
    step_id: StepId = _NO_STEP
    offset: int = 0
    """In the slot."""
    n_bytes: int = 0


class Link:
    """A stream socket; all methods raise TimeoutError at the deadline, ConnectionError at its end.

    Whatever else the network reports is another OSError.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def fill(self, target: memoryview, deadline_s: float) -> None:
        """Receive as many bytes as the target has, in place."""
        done = 0
        while done < len(target):
            self._wait_until(deadline_s)
            n = self._socket.recv_into(target[done:])
            if n == 0:
                raise ConnectionError("the peer closed the connection")
            done += n

    def receive(self, n_bytes: int, deadline_s: float) -> bytes:
        """The next bytes; for small amounts."""
        data = bytearray(n_bytes)
        self.fill(memoryview(data), deadline_s)
        return bytes(data)

    def send(self, head: bytes, body: memoryview | None = None, *, deadline_s: float) -> None:
        """Send all bytes of one or two pieces."""
        self._wait_until(deadline_s)
        self._socket.sendall(head, socket.MSG_MORE if body else 0)
        if body:
            self._wait_until(deadline_s)
            self._socket.sendall(body)

    def is_quiet(self) -> bool:
        """Whether the connection is open, as far as one knows, and nothing unasked has arrived."""
        self._socket.settimeout(0)
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def interrupt(self) -> None:
        """End the connection under whoever waits for it in another thread."""
        with contextlib.suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of the socket."""
        self._socket.close()

    def _wait_until(self, deadline_s: float) -> None:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the deadline has passed")
        self._socket.settimeout(left_s)


def encode_request(request: Request) -> bytes:
    """The bytes of a request."""
    body = _REQUEST.pack(
        request.kind,
        request.rank,
        min(max(1, int(request.timeout_s * 1000)), _MAX_TIMEOUT_MS),
        *request.step_id,
        request.offset,
        request.n_bytes,
    )
    return body + _CRC.pack(crc32c(body))


def decode_request(data: bytes) -> Request:
    """Inverse of ``encode_request``; raises WireError."""
    body = data[: _REQUEST.size]
    if len(data) != REQUEST_BYTES or data[_REQUEST.size :] != _CRC.pack(crc32c(body)):
        raise WireError("a request arrived damaged")
    kind, rank, timeout_ms, generation, step, offset, n_bytes = _REQUEST.unpack(body)
    if kind not in (LIST, READ):
        raise WireError(f"a request of kind {kind} arrived, expected {LIST} or {READ}")
    return Request(
        kind=kind,
        timeout_s=timeout_ms / 1000,
        rank=rank,
        step_id=StepId(generation, step),
        offset=offset,
        n_bytes=n_bytes,
    )


def send_frame(link: Link, kind: int, payload: memoryview, deadline_s: float) -> None:
    """Send a frame of at most ``BLOCK_BYTES``."""
    head = _FRAME.pack(kind, len(payload))
    crc = crc32c(payload, crc32c(head))
    link.send(head + _CRC.pack(crc), payload, deadline_s=deadline_s)


def send_refusal(link: Link, sentence: str, *, gone: bool, deadline_s: float) -> None:
    """Answer with a sentence."""
    text = sentence.encode()[:_SENTENCE_BYTES]
    send_frame(link, GONE if gone else REFUSED, memoryview(text), deadline_s)


def receive_data(link: Link, target: memoryview, deadline_s: float) -> None:
    """Receive a frame of data that has exactly the size of the target, in place, and verify it.

    Raises:
        WireError: another frame arrived, or it is damaged.
        RefusedError: a refusal arrived.
        OSError: as ``Link`` raises it.
    """
    n_bytes, crc, seed = _receive_head(link, deadline_s)
    if n_bytes != len(target):
        raise WireError(f"a frame of {n_bytes} bytes arrived, expected {len(target)}")
    link.fill(target, deadline_s)
    _check(target, crc, seed)


def encode_slots(slots: Iterable[SlotName]) -> bytes:
    """The payload of the answer to a request to list."""
    return b"".join(_SLOT.pack(rank, *step_id) for rank, step_id in slots)


def receive_slots(link: Link, deadline_s: float) -> list[SlotName]:
    """Receive the answer to a request to list; raises as ``receive_data``."""
    n_bytes, crc, seed = _receive_head(link, deadline_s)
    if n_bytes > BLOCK_BYTES or n_bytes % _SLOT.size:
        raise WireError(f"a list of {n_bytes} bytes arrived, expected {_SLOT.size} for each slot")
    data = link.receive(n_bytes, deadline_s)
    _check(data, crc, seed)
    return [(rank, StepId(*step)) for rank, *step in _SLOT.iter_unpack(data)]


def _receive_head(link: Link, deadline_s: float) -> tuple[int, int, int]:
    """Of a frame of data its size, its checksum and the checksum so far; raises RefusedError."""
    data = link.receive(_FRAME.size + _CRC.size, deadline_s)
    head, (crc,) = data[: _FRAME.size], _CRC.unpack_from(data, _FRAME.size)
    kind, n_bytes = _FRAME.unpack(head)
    seed = crc32c(head)
    if kind == DATA:
        return n_bytes, crc, seed
    if kind not in (REFUSED, GONE) or n_bytes > _SENTENCE_BYTES:
        raise WireError(f"a frame of kind {kind} with {n_bytes} bytes arrived, expected data")
    text = link.receive(n_bytes, deadline_s)
    _check(text, crc, seed)
    raise RefusedError(text.decode(errors="replace"), gone=kind == GONE)


def _check(data: bytes | memoryview, expected: int, seed: int) -> None:
    found = crc32c(data, seed)
    if found != expected:
        raise WireError(f"bytes arrived with checksum {found:08x}, expected {expected:08x}")
