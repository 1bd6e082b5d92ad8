"""The keeper's loop: who is connected, when nobody is left, when it is time to end."""

import contextlib
import os
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.errors import KeeperError
from everstep.checkpoint.keeper.deputy import Deputy
from everstep.checkpoint.keeper.flushes import FlushSlot
from everstep.checkpoint.keeper.house import House
from everstep.checkpoint.keeper.place import peer_of
from everstep.checkpoint.keeper.requests import Answer, Client, serve
from everstep.checkpoint.keeper.slots import Slot
from everstep.checkpoint.keeper.wire import Channel, Frame, WireError
from everstep.checkpoint.lineage import StepId

T = TypeVar("T")
_LOOP_LIMIT_S = 10.0
RETURN_S = 5.0
"""How long trainers of a keeper that was killed have to connect to the next one."""
ARRIVAL_S = 120.0
"""How long trainers have to come for the first time, at least."""
FAREWELL_S = 30.0
"""How long trainers have to end, after a keeper was told to end by a signal."""


class DataPlane(Protocol):
    """Serves reads of slots to other nodes, in threads of its own."""

    @property
    def address(self) -> str:
        """``host:port``."""
        ...

    def close(self) -> None:
        """End it."""
        ...


ReadSlot = Callable[[int, StepId], AbstractContextManager[ByteArray]]
"""(rank, snapshot) -> a context with the bytes of the slot that holds it, which is not freed
meanwhile; entering it raises KeeperError where there is none. For any thread but the loop's."""
SealedSlots = Callable[[], list[tuple[int, StepId]]]
"""Rank and snapshot of all slots that are sealed. For any thread but the loop's."""
DataPlaneFactory = Callable[[ReadSlot, SealedSlots, bytes, str | None], DataPlane]
"""(read, list, token, network interface) -> a data plane."""


class Keeper:
    """Serves the clients of one job until the job is over.

    Args:
        listener: where clients connect; stays open when this ends.
        deputy: what is to outlive this process is left with it.
        budget_bytes: for all slots.
        linger_s: how long to stay without any trainer.
        flush: makes a snapshot durable.
        log: takes a line for people.
        token: of the job, for the data plane.
        data_plane_factory: makes a data plane; None: there is none.
        interface: of the network, for the data plane.
        new_supervisor: starts one in the place of one that was killed; None: it cannot be done.
    """

    def __init__(
        self,
        listener: socket.socket,
        deputy: Deputy,
        *,
        budget_bytes: int,
        linger_s: float,
        flush: FlushSlot,
        log: Callable[[str], None],
        token: bytes = b"",
        data_plane_factory: DataPlaneFactory | None = None,
        interface: str | None = None,
        new_supervisor: Callable[[], Channel | None] = lambda: None,
    ) -> None:
        self._listener = listener
        self._deputy = deputy
        self._linger_s = linger_s
        self._log = log
        self._new_supervisor = new_supervisor
        self._posted: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector = selectors.DefaultSelector()
        self._clients: set[Client] = set()
        self._house = House(
            deputy, budget_bytes=budget_bytes, flush=flush, post=self._post, log=log
        )
        self._house.inherit()
        self._alone_since_s = time.monotonic()
        self._expected = set(deputy.notes.get("trainers", ()))
        self._expected_until_s = self._alone_since_s + RETURN_S
        self._orphaned = bool(deputy.notes.get("orphaned"))
        self._rescuing = False
        self._ending_since_s: float | None = None
        self._signalled = False
        self._data_plane: DataPlane | None = None
        if data_plane_factory is not None:
            self._data_plane = data_plane_factory(
                self._read_slot, self._sealed_slots, token, interface
            )
            self._house.address = self._data_plane.address

    def run(self) -> None:
        """Serve until stopped, or until nobody has been there for ``linger_s``."""
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake, selectors.EVENT_READ, self._run_posted)
        self._watch_supervisor()
        self._deputy.up()
        try:
            while not self._is_over():
                for key, events in self._selector.select(timeout=self._patience_s()):
                    key.data(events)
        finally:
            self._close()

    def terminate(self) -> None:
        """Make durable what is newest, let trainers end, and end; for handlers of signals."""
        self._signalled = True
        self._house.stop("flush")
        self._post(lambda: None)

    # Events

    def _post(self, action: Callable[[], None]) -> None:
        self._posted.append(action)
        with contextlib.suppress(OSError, ValueError):  # the loop has ended
            os.eventfd_write(self._wake, 1)

    def _run_posted(self, _: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while self._posted:
            self._posted.popleft()()

    def _accept(self, _: int) -> None:
        try:
            connection, _address = self._listener.accept()
        except OSError:
            return  # it has gone again, or there are too many
        pid, uid = peer_of(connection)
        if uid != os.geteuid():
            self._log(f"process {pid} of user {uid} was turned away")
            connection.close()
            return
        connection.setblocking(False)
        client = Client(channel=Channel(connection), pid=pid)
        self._clients.add(client)
        self._selector.register(
            connection.fileno(), selectors.EVENT_READ, lambda events: self._talk(client, events)
        )
        with contextlib.suppress(OSError):
            # processes that it has forked may hold the connection open when it has died
            client.pidfd = os.pidfd_open(pid)
            self._selector.register(
                client.pidfd, selectors.EVENT_READ, lambda _: self._bury(client)
            )

    def _bury(self, client: Client) -> None:
        """Hear what a process that has ended has said before."""
        while not client.closed and self._talk(client, selectors.EVENT_READ):
            pass
        self._drop(client)

    def _talk(self, client: Client, events: int) -> bool:
        """Do what a client asks for, if it is still there; True if it has asked for something."""
        if client.closed:
            return False  # dropped by an event just before this one
        frames: list[Frame] = []
        try:
            if events & selectors.EVENT_WRITE:
                client.channel.flush()
            if events & selectors.EVENT_READ:
                frames = client.channel.receive()
            for frame in frames:
                if client not in self._clients:  # dropped by what it has asked for
                    frame.close()
                elif frame.body.get("do") == "hello":
                    self._greet(client, frame)
                else:
                    serve(self._house, client, frame)
        except EOFError:
            self._drop(client)
        except (OSError, WireError) as error:
            self._log(f"process {client.pid}: {error}")
            self._drop(client)
        self._watch_writers()
        return bool(frames)

    def _watch_writers(self) -> None:
        """Look for room to write to those for whom something waits."""
        for client in self._clients:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.channel.unsent else 0)
            key = self._selector.get_key(client.channel)
            if key.events != wanted:
                self._selector.modify(client.channel, wanted, key.data)

    # Clients

    def _greet(self, client: Client, frame: Frame) -> None:
        frame.close()
        rank, world_size = frame.body.get("rank"), frame.body.get("world_size", 0)
        answer = Answer(client, frame.body.get("id", -1))
        if rank is not None and not (
            type(rank) is int and type(world_size) is int and 0 <= rank < world_size
        ):
            answer.fail(KeeperError(f"{rank!r:.20} is no rank of {world_size!r:.20} ranks"))
            return
        for other in [c for c in self._clients if c.rank == rank is not None and c is not client]:
            self._log(f"rank {rank}: process {client.pid} takes the place of {other.pid}")
            other.rank = None  # it has not vanished
            with contextlib.suppress(OSError, WireError):
                other.channel.send({"event": "superseded"})
            self._drop(other)
        client.rank, client.world_size = rank, world_size
        if rank is not None:
            self._orphaned = self._rescuing = False  # what it leaves is to be rescued anew
            self._note_trainers()
        answer({"pid": os.getpid()})

    def _drop(self, client: Client) -> None:
        if client.closed:
            return
        client.closed = True
        self._clients.discard(client)
        self._selector.unregister(client.channel)
        if client.pidfd is not None:
            self._selector.unregister(client.pidfd)
            os.close(client.pidfd)
        client.channel.close()
        for slot in client.pins.values():
            self._house.table.unpin(slot)
        client.pins.clear()
        if client.rank is not None:
            if not client.finished:
                self._orphaned = True
                self._log(f"rank {client.rank} (process {client.pid}) is gone")
            self._note_trainers()

    def _note_trainers(self) -> None:
        trainers = {c.rank: c.pid for c in self._clients if c.rank is not None}
        self._house.trainers = trainers
        self._deputy.note("trainers", sorted(trainers))
        self._deputy.note("orphaned", self._orphaned)

    # For the threads of the data plane

    @contextlib.contextmanager
    def _read_slot(self, rank: int, step_id: StepId) -> Iterator[ByteArray]:
        table = self._house.table

        def find() -> Slot | None:
            for slot in table.slots():
                seal = slot.seal()
                if seal is not None and (seal.rank, seal.step_id) == (rank, step_id):
                    table.pin(slot)
                    return slot
            return None

        found = self._in_loop(find)
        if found is None:
            raise KeeperError(
                f"step {step_id.step} of rank {rank} is not in this keeper's memory (any more): "
                "choose another snapshot"
            )
        try:
            yield found.memory
        finally:
            self._post(lambda: table.unpin(found))

    def _sealed_slots(self) -> list[tuple[int, StepId]]:
        slots = self._house.table.slots
        return self._in_loop(
            lambda: [(s.rank, s.step_id) for slot in slots() if (s := slot.seal()) is not None]
        )

    def _in_loop(self, action: Callable[[], T]) -> T:
        future: Future[T] = Future()
        self._post(lambda: future.set_result(action()))
        try:
            return future.result(_LOOP_LIMIT_S)
        except FutureTimeoutError:
            raise KeeperError("the keeper is ending: ask another one") from None

    # The supervisor

    def _watch_supervisor(self) -> None:
        if self._deputy.channel is not None:
            self._selector.register(
                self._deputy.channel, selectors.EVENT_READ, self._hear_supervisor
            )

    def _hear_supervisor(self, _: int) -> None:
        channel = self._deputy.channel
        assert channel is not None
        try:
            for frame in channel.receive():
                frame.close()  # it says nothing after the beginning
            return
        except (EOFError, OSError, WireError):
            self._selector.unregister(channel)
        self._log("the supervisor is gone: starting another one")
        try:
            successor = self._new_supervisor()
        except OSError as error:
            self._log(f"there is none: {error}")
            successor = None
        self._deputy.change(successor, self._house.holds())
        self._watch_supervisor()

    # Life

    @property
    def _limit_s(self) -> float:
        """How long to stay alone; trainers import libraries before they come for the first time."""
        came = "trainers" in self._deputy.notes
        return self._linger_s if came else max(self._linger_s, ARRIVAL_S)

    def _patience_s(self) -> float:
        """Until it is to be looked whether something is due, without any event."""
        if self._expected or self._ending_since_s is not None:
            return 0.5
        left_s = self._limit_s - (time.monotonic() - self._alone_since_s)
        return min(2.0, max(0.05, left_s))

    def _is_over(self) -> bool:
        """Do what is due when nobody else is there to do it; True when nothing is left to do."""
        now_s = time.monotonic()
        house = self._house
        if self._expected and not self._expected - set(house.trainers):
            self._expected = set()
        elif self._expected and now_s > self._expected_until_s:
            self._log(f"ranks {sorted(self._expected - set(house.trainers))} did not come back")
            self._expected, self._orphaned = set(), True
        if any(client.is_owner for client in self._clients) or house.flushes.busy:
            self._alone_since_s = now_s
        if house.stopping == "now":
            return True
        if house.stopping is not None and self._ending_since_s is None:
            self._ending_since_s = now_s
            self._log("asked to end")
            self._rescue()
        elif self._orphaned and not house.trainers and not self._expected and not self._rescuing:
            self._rescue()
        if self._rescuing and not house.flushes.busy:
            self._rescuing = self._orphaned = False
            self._deputy.note("orphaned", False)
            if not house.trainers:
                house.release_locks()
        if self._ending_since_s is not None:
            waits = self._signalled and now_s < self._ending_since_s + FAREWELL_S
            return not house.flushes.busy and not (waits and house.trainers)
        alone_s = now_s - self._alone_since_s
        if alone_s > self._limit_s and not self._expected and not self._rescuing:
            self._log(f"nobody has been here for {alone_s:.0f} s")
            return True
        return False

    def _rescue(self) -> None:
        self._rescuing = True
        self._house.rescue()

    def _close(self) -> None:
        self._log("ends")
        if self._data_plane is not None:
            self._data_plane.close()
        self._deputy.end()
        for client in list(self._clients):
            client.rank = None
            self._drop(client)
        self._house.close()
        self._selector.close()
        wake, self._wake = self._wake, -1  # flushes may still end, in their threads
        os.close(wake)
        if self._deputy.channel is not None:
            self._deputy.channel.close()
