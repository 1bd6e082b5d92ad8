"""Reads slots of the keeper of another node, over its data plane (see ``transport``)."""

import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

import numpy as np

from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.errors import KeeperError
from everstep.checkpoint.keeper.access import checked_token, enter
from everstep.checkpoint.keeper.data_wire import (
    BLOCK_BYTES,
    LIST,
    READ,
    Link,
    RefusedError,
    Request,
    WireError,
    encode_request,
    receive_data,
    receive_slots,
)
from everstep.checkpoint.kernels import crc32c
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.records import MAX_RECORD_BYTES
from everstep.checkpoint.snapshots.slot_format import PAGE_BYTES, Seal, decode_seal

_KEPT_S = 20.0
"""How long a connection that nobody uses is kept; a keeper ends it after a minute."""
_ANY_SLOT_BYTES = 2**63
_ELSEWHERE = "or resume from another copy or the newest durable step"

T = TypeVar("T")


class SlotGoneError(KeeperError):
    """The keeper answers, but does not hold that snapshot (any more)."""


class RemoteSlots:
    """The sealed slots of one keeper. Threads may share it: each has a connection while it reads.

    Connects when it is first used, so that to make one cannot fail.

    Args:
        address: of the keeper's data plane, 'host:port'.
        token: of the job.
        timeout_s: how long to wait for the connection, and for each block of at most 1 MiB.

    Raises:
        ValueError: the address or the token is none.
    """

    def __init__(self, address: str, token: bytes, *, timeout_s: float = 30.0) -> None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ValueError(f"address {address!r}: expected 'host:port'")
        self.address = address
        """Of the keeper's data plane."""
        self._peer, self._token = (host, int(port)), checked_token(token)
        self._timeout_s = timeout_s
        self._guard = threading.Lock()
        self._idle: list[tuple[float, Link]] = []

    def holdings(self) -> list[tuple[Seal, bytes]]:
        """What is sealed there: of each slot its seal and its part.

        A slot that is overwritten meanwhile, or whose seal or part is not whole, is left out.

        Raises:
            KeeperError: the keeper cannot be reached, or is none of this job.
        """
        request = Request(kind=LIST, timeout_s=self._timeout_s)
        held = []
        for rank, step_id in self._ask(request, lambda link: receive_slots(link, self._by())):
            try:
                seal = decode_seal(self._read(rank, step_id, 0, PAGE_BYTES), _ANY_SLOT_BYTES)
                if seal is None or (seal.rank, seal.step_id) != (rank, step_id):
                    continue
                if seal.part_bytes > MAX_RECORD_BYTES:
                    continue
                part = self._read(rank, step_id, seal.part_start, seal.part_bytes)
            except SlotGoneError:
                continue
            if crc32c(part) == seal.part_crc32c:
                held.append((seal, part))
        return held

    def read_into(self, rank: int, step_id: StepId, offset: int, destination: ByteArray) -> None:
        """Fill an array with bytes of a slot; each block is verified as it arrives.

        Args:
            rank: whose slot.
            step_id: of the snapshot that it holds.
            offset: in the slot.
            destination: contiguous; after an error some of it may be overwritten.

        Raises:
            SlotGoneError: the keeper does not hold this snapshot.
            KeeperError: the keeper cannot be reached, is none of this job, is late, or what it
                sends is not what was asked for.
        """
        target = destination.data
        if not len(target):
            return
        request = Request(
            kind=READ,
            timeout_s=self._timeout_s,
            rank=rank,
            step_id=step_id,
            offset=offset,
            n_bytes=len(target),
        )

        def take(link: Link) -> None:
            for begin in range(0, len(target), BLOCK_BYTES):
                receive_data(link, target[begin : begin + BLOCK_BYTES], self._by())

        self._ask(request, take)

    def close(self) -> None:
        """End the connections that nobody uses; later calls connect again."""
        with self._guard:
            idle, self._idle = self._idle, []
        for _, link in idle:
            link.close()

    def __enter__(self) -> "RemoteSlots":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self, rank: int, step_id: StepId, offset: int, n_bytes: int) -> bytes:
        data = np.empty(n_bytes, np.uint8)
        self.read_into(rank, step_id, offset, data)
        return data.tobytes()

    def _ask(self, request: Request, take: Callable[[Link], T]) -> T:
        """What ``take`` makes of the answer."""
        asked = "the list of its slots"
        if request.kind == READ:
            generation, step = request.step_id
            asked = f"rank {request.rank}'s slot of step {step} (generation {generation})"
        link = self._unused() or self._connected()
        try:
            link.send(encode_request(request), deadline_s=self._by())
            answer = take(link)
        except BaseException as error:
            if isinstance(error, RefusedError) and error.gone:
                self._keep(link)  # the answer ended with it
            else:
                link.close()
            raise self._explained(error, asked) from None
        self._keep(link)
        return answer

    def _explained(self, error: BaseException, asked: str) -> BaseException:
        at = f"the keeper at {self.address}"
        if isinstance(error, RefusedError):
            kind = SlotGoneError if error.gone else KeeperError
            return kind(f"{at} refuses {asked}: {error}")
        if isinstance(error, WireError):
            return KeeperError(
                f"{at} was asked for {asked}, and {error}: try again, check the network, "
                f"{_ELSEWHERE}"
            )
        if isinstance(error, TimeoutError):
            return KeeperError(
                f"{at} was asked for {asked} and is late: expected each MiB of it within "
                f"{self._timeout_s:g} s; check that its node is up and its keeper runs, "
                f"{_ELSEWHERE}"
            )
        if isinstance(error, OSError):
            return KeeperError(
                f"{at} was asked for {asked} and is gone ({_reason(error)}): check that its node "
                f"is up and its keeper runs, {_ELSEWHERE}"
            )
        return error

    def _connected(self) -> Link:
        deadline_s = self._by()
        try:
            connection = socket.create_connection(self._peer, self._timeout_s)
        except OSError as error:
            raise KeeperError(
                f"no keeper can be reached at {self.address} ({_reason(error)}): check that its "
                f"node is up and its keeper has a data plane on that interface, {_ELSEWHERE}"
            ) from None
        link = Link(connection)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            known = enter(link, self._token, deadline_s)
        except OSError as error:
            link.close()
            raise KeeperError(
                f"{self.address} did not let this process in ({_reason(error)}): expected the "
                "keeper of the same job, with the same token and of the same version; check the "
                "job's name and the address"
            ) from None
        except BaseException:
            link.close()
            raise
        if not known:
            link.close()
            raise KeeperError(
                f"{self.address} does not know the job's token: expected the keeper of the same "
                "job; check the job's name and the address"
            )
        return link

    def _unused(self) -> Link | None:
        """A connection of before that is still good."""
        now_s = time.monotonic()
        with self._guard:
            idle, self._idle = self._idle, []
            fresh = [(s, link) for s, link in idle if s + _KEPT_S > now_s and link.is_quiet()]
            found = fresh.pop()[1] if fresh else None
            self._idle = fresh
        kept = {link for _, link in fresh} | {found}
        for _, link in idle:
            if link not in kept:
                link.close()
        return found

    def _keep(self, link: Link) -> None:
        with self._guard:
            self._idle.append((time.monotonic(), link))

    def _by(self) -> float:
        return time.monotonic() + self._timeout_s


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "it does not answer in time"
    return error.strerror or str(error)
