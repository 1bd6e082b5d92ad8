"""The data plane of a keeper: ranged reads of its sealed slots over TCP, for those with the token.

Plain TCP, one thread per connection, sent straight out of the slot; see ``access`` for who gets in
and ``data_wire`` for the bytes. The other end is ``remote_slots``.
"""

import contextlib
import fcntl
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType

from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.errors import KeeperError
from everstep.checkpoint.keeper.access import admit, checked_token
from everstep.checkpoint.keeper.data_wire import (
    BLOCK_BYTES,
    DATA,
    LIST,
    REQUEST_BYTES,
    Link,
    Request,
    SlotName,
    WireError,
    decode_request,
    encode_slots,
    send_frame,
    send_refusal,
)
from everstep.checkpoint.lineage import StepId

ReadSlot = Callable[[int, StepId], AbstractContextManager[ByteArray]]
"""Gives the whole slot of a rank that holds a snapshot, which stays as it is while the context is
open; entering it raises KeeperError where there is none."""

_LOOPBACK = "127.0.0.1"
_SIOCGIFADDR = 0x8915
_NO_ROOM_S = 0.1
_CLOSE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What peers may take of a keeper."""

    strangers: int = 32
    """Connections that have not proved anything yet; one more ends the oldest of them."""
    readers: int = 512
    """Connections that have."""
    handshake_s: float = 5.0
    """From the connection to its proof."""
    idle_s: float = 60.0
    """From one answer to the end of the next request."""
    block_s: float = 30.0
    """For taking one block of an answer, at most: the slot is pinned meanwhile."""


class DataPlane:
    """Listens on one address until ``close()``.

    Args:
        read_slot: gives the bytes of a slot.
        token: of the job.
        sealed_slots: which slots there are.
        interface: name of the network interface whose IPv4 address it listens on; None: loopback,
            which only processes of this host can reach.
        port: 0: a free one.
        limits: what peers may take.

    Raises:
        KeeperError: there is no such interface or address, or the port is taken.
        ValueError: the token is none.
    """

    def __init__(
        self,
        read_slot: ReadSlot,
        token: bytes,
        *,
        sealed_slots: Callable[[], Iterable[SlotName]],
        interface: str | None = None,
        port: int = 0,
        limits: Limits | None = None,
    ) -> None:
        self._read_slot, self._sealed_slots = read_slot, sealed_slots
        self._token, self._limits = checked_token(token), limits or Limits()
        self._guard = threading.Lock()
        self._strangers: dict[Link, None] = {}  # the oldest first
        self._readers: set[Link] = set()
        self._threads: set[threading.Thread] = set()
        self._closing = threading.Event()
        self._listener = _listen(_LOOPBACK if interface is None else address_of(interface), port)
        host, port = self._listener.getsockname()
        self.address = f"{host}:{port}"
        """Where it listens, as 'host:port'."""
        self._acceptor = threading.Thread(
            target=self._accept, name="everstep-data-plane", daemon=True
        )
        self._acceptor.start()

    def close(self) -> None:
        """Stop listening and end all connections; may be called twice."""
        deadline_s = _after(_CLOSE_S)
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._acceptor.join(_left(deadline_s))
        self._listener.close()
        with self._guard:
            threads = list(self._threads)
            for link in (*self._strangers, *self._readers):
                link.interrupt()
        for thread in threads:
            thread.join(_left(deadline_s))

    def __enter__(self) -> "DataPlane":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closing, out of descriptors, or a peer that left at once
                self._closing.wait(_NO_ROOM_S)
                continue
            link = Link(connection)
            thread = threading.Thread(
                target=self._serve, args=(link,), name="everstep-reader", daemon=True
            )
            with self._guard:
                while len(self._strangers) >= self._limits.strangers:
                    oldest = next(iter(self._strangers))
                    del self._strangers[oldest]
                    oldest.interrupt()
                self._strangers[link] = None
                self._threads.add(thread)
            try:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                thread.start()
            except (OSError, RuntimeError):  # it has left; there is no room for another thread
                self._forget(link, thread)

    def _serve(self, link: Link) -> None:
        try:
            if admit(link, self._token, _after(self._limits.handshake_s)):
                with self._guard:
                    full = len(self._readers) >= self._limits.readers
                    if not full:
                        self._strangers.pop(link, None)
                        self._readers.add(link)
                if full:
                    self._turn_away(link)
                else:
                    self._converse(link)
        except (OSError, WireError):
            pass  # it left, is too slow, or sends garbage: that it is closed says so to the peer
        finally:
            self._forget(link, threading.current_thread())

    def _turn_away(self, link: Link) -> None:
        deadline_s = _after(self._limits.handshake_s)
        link.receive(REQUEST_BYTES, deadline_s)
        sentence = f"it serves {self._limits.readers} connections already; try again later"
        send_refusal(link, sentence, gone=False, deadline_s=deadline_s)

    def _converse(self, link: Link) -> None:
        while not self._closing.is_set():
            request = decode_request(link.receive(REQUEST_BYTES, _after(self._limits.idle_s)))
            each_s = min(request.timeout_s, self._limits.block_s)
            if request.kind == LIST:
                slots = memoryview(encode_slots(self._sealed_slots()))
                send_frame(link, DATA, slots, _after(each_s))
            else:
                self._send_bytes(link, request, each_s)

    def _send_bytes(self, link: Link, request: Request, each_s: float) -> None:
        with contextlib.ExitStack() as pinned:
            try:
                slot = pinned.enter_context(self._read_slot(request.rank, request.step_id))
            except KeeperError as error:
                send_refusal(link, str(error), gone=True, deadline_s=_after(each_s))
                return
            begin, end = request.offset, request.offset + request.n_bytes
            if end > len(slot):
                sentence = f"the slot has {len(slot)} bytes, not {end}"
                send_refusal(link, sentence, gone=False, deadline_s=_after(each_s))
                return
            for at in range(begin, end, BLOCK_BYTES):
                block = slot[at : min(at + BLOCK_BYTES, end)].data
                send_frame(link, DATA, block, _after(each_s))

    def _forget(self, link: Link, thread: threading.Thread) -> None:
        with self._guard:
            self._strangers.pop(link, None)
            self._readers.discard(link)
            self._threads.discard(thread)
            link.close()


def address_of(interface: str) -> str:
    """The IPv4 address of a network interface; raises KeeperError naming those that have one."""
    address = _ipv4(interface)
    if address is None:
        known = [f"{name} ({found})" for _, name in socket.if_nameindex() if (found := _ipv4(name))]
        raise KeeperError(
            f"network interface {interface!r} has no IPv4 address on this host: name one of "
            f"{', '.join(known) or 'those that have one (there is none)'}"
        )
    return address


def _ipv4(interface: str) -> str | None:
    name = interface.encode()
    if not 0 < len(name) < 16 or b"\0" in name:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), backlog=128)
    except OSError as error:
        raise KeeperError(
            f"the data plane cannot listen on {host}:{port} ({error.strerror}): choose another "
            "port, 0 for any that is free, or another interface"
        ) from None


def _after(duration_s: float) -> float:
    return time.monotonic() + duration_s


def _left(deadline_s: float) -> float:
    return max(0.0, deadline_s - time.monotonic())
