"""The memory of a keeper, as the snapshot engine of one rank uses it."""

import contextlib
import os
import socket
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.errors import EverstepError, KeeperError
from everstep.checkpoint.keeper import segments
from everstep.checkpoint.keeper.link import Ask, Link, Reply
from everstep.checkpoint.keeper.place import KeeperPlace
from everstep.checkpoint.keeper.slots import SetShape
from everstep.checkpoint.keeper.wire import close_all
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.snapshots.memory import Flushed, FlushOrder
from everstep.checkpoint.snapshots.slot_format import Seal, part_of, read_seal

_SLOWEST_PREFAULT_BYTES_PER_S = 2**28
_OOM_SCORE_ADJ = Path("/proc/self/oom_score_adj")
_OPEN: "weakref.WeakSet[KeeperMemory]" = weakref.WeakSet()


@dataclass(eq=False, kw_only=True)
class Holding:
    """A sealed slot of a keeper of this node; it is not freed until it is released."""

    seal: Seal
    part: bytes
    """The rank's vote: see ``manifest.decode_part``."""
    memory: ByteArray
    """The whole slot, read-only. Its rank may capture into it again: checksums tell."""
    _release: Callable[[], None] = field(repr=False)

    def release(self) -> None:
        """The keeper may free the slot; ``memory`` is not to be used any more. May be repeated."""
        self._release()


@dataclass(eq=False)
class _Mapped:
    """A set of slots that this process has reserved."""

    shape: SetShape
    fds: tuple[int, ...]
    slots: list[ByteArray]


@dataclass(eq=False)
class _Pin:
    set_id: str
    index: int
    number: int


class KeeperMemory:
    """Slots of one rank in the keeper of its node: a ``SlotMemory``. Thread-safe.

    What is sealed there survives this process. A keeper that was killed and started again is
    connected to by itself, and is given the descriptors of the slots, in case that it has lost
    them.

    Args:
        job: the name under which the keeper was started.
        rank: of this process; another process with the same rank takes its place.
        world_size: number of ranks of the job.
        place: the directory of the keepers' sockets; None: the default.
        timeout_s: how long to wait for the keeper, and for its answers.

    Raises:
        KeeperError: there is no keeper, or its place is not safe.
    """

    def __init__(
        self,
        job: str,
        *,
        rank: int,
        world_size: int,
        place: Path | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        self._rank, self._world_size, self._timeout_s = rank, world_size, timeout_s
        self._place = KeeperPlace.of(job, place)
        self._lock = threading.Lock()  # of what follows; never held while waiting for an answer
        self._sets: list[_Mapped] = []
        self._current: _Mapped | None = None
        self._pins: list[_Pin] = []
        self._locks: dict[str, int] = {}
        self._orphan_order: FlushOrder | None = None
        self._flushes: set[Future[Flushed]] = set()
        self._closed = False
        self._link = Link(self._place, self._greet, timeout_s)
        _OPEN.add(self)

    # SlotMemory

    def reserve(self, slot_bytes: int, slots: int) -> Sequence[ByteArray]:
        """See ``SlotMemory.reserve``; ``pinned`` tells which of them the keeper still reads.

        Raises:
            SlotMemoryError: the keeper's budget, or the host, has no room for them.
            KeeperError: the keeper does not answer.
        """
        limit_s = self._timeout_s + slot_bytes * slots / _SLOWEST_PREFAULT_BYTES_PER_S
        reply = self._link.call("reserve", timeout_s=limit_s, slot_bytes=slot_bytes, slots=slots)
        shape = SetShape.from_json(reply.result)
        with self._lock:
            known = next((m for m in self._sets if m.shape == shape), None)
            if known is not None:
                close_all(reply.fds)
            else:
                arrays = [segments.map_slot(f, writable=True, populate=True) for f in reply.fds]
                known = _Mapped(shape, reply.fds, arrays)
                self._sets.append(known)
            self._current = known
            return list(known.slots)

    def free_others(self) -> None:
        """See ``SlotMemory.free_others``."""
        with self._lock:
            others = [m for m in self._sets if m is not self._current]
            self._sets = [m for m in self._sets if m is self._current]
            for mapped in others:
                close_all(mapped.fds)
                mapped.slots.clear()
        self._link.call("free_others")

    def sealed(self, index: int, all_sealed: StepId | None) -> None:
        """See ``SlotMemory.sealed``; does not wait."""
        told = None if all_sealed is None else list(all_sealed)
        self._link.submit("sealed", index=index, all_sealed=told)

    def flush(self, index: int, order: FlushOrder) -> "Future[Flushed]":
        """See ``SlotMemory.flush``; fails with KeeperError when there is no keeper for long."""
        with self._lock:
            current = self._current
        future: Future[Flushed] = Future()
        if current is None:
            future.set_exception(KeeperError("there are no slots to flush: reserve them first"))
            return future
        with self._lock:
            self._flushes.add(future)
        asked = self._link.submit(
            "flush", set_id=current.shape.set_id, index=index, order=order.as_json()
        )
        asked.add_done_callback(lambda done: self._flushed(done, future))
        return future

    def close(self, *, finished: bool = True) -> None:
        """See ``SlotMemory.close``; waits as long as the flushes' orders say."""
        with self._lock:
            under_way, already = set(self._flushes), self._closed
            self._closed = True
        if already:
            return
        wait(under_way)
        if finished:
            with contextlib.suppress(KeeperError):  # gone: there is nobody to tell
                self._link.call("goodbye", finished=True)
        self._link.close()
        with self._lock:
            for mapped in self._sets:
                close_all(mapped.fds)
                mapped.slots.clear()
            close_all(self._locks.values())
            self._sets, self._current, self._locks = [], None, {}

    # More than a SlotMemory

    @property
    def name(self) -> str:
        """Which keeper it is: host, place and job."""
        return f"{socket.gethostname()}:{self._place.path}"

    def pinned(self) -> set[int]:
        """Reserved slots that are being flushed or read: they are not to be captured into now."""
        return set(self._link.call("pinned").result["slots"])

    def flushing(self) -> set[StepId]:
        """Snapshots that the keeper is writing: what there is of them on disk is no garbage."""
        return {StepId(*coded) for coded in self._link.call("flushing").result["steps"]}

    def set_orphan_order(self, order: FlushOrder) -> None:
        """How the keeper is to flush a snapshot of this rank when all trainers have vanished.

        Args:
            order: its ``step_id`` stands for that of the snapshot; it is flushed at full speed.
        """
        with self._lock:
            self._orphan_order = order
        self._link.call("orphan_order", order=order.as_json())

    def lend_lock(self, directory: str, fd: int) -> None:
        """Have the keeper hold the lock of a checkpoint directory while it may write there.

        Args:
            directory: whose lock it is.
            fd: of a ``DirectoryLock``. Duplicates of it hold the lock until this memory is closed.
        """
        mine = os.dup(fd)
        with self._lock:
            before = self._locks.pop(directory, None)
            self._locks[directory] = mine
        if before is not None:
            os.close(before)
        self._link.call("lend_lock", [fd], directory=directory)

    def borrowed_lock(self, directory: str) -> int | None:
        """A new descriptor that holds the lock of a directory; None if the keeper has none."""
        fds = self._link.call("borrow_lock", directory=directory).fds
        return fds[0] if fds else None

    def holdings(self) -> list[Holding]:
        """Everything that is sealed on this node, mapped read-only; release each of them."""
        found: list[Holding] = []
        known: list[tuple[str, int]] = []
        more = True
        try:
            while more:
                reply = self._link.call("holdings", known=known)
                more = reply.result["more"]
                known += ((told["set_id"], told["index"]) for told in reply.result["slots"])
                found += self._map_holdings(reply)
        except BaseException:
            for holding in found:
                holding.release()
            raise
        return found

    def address(self) -> str | None:
        """``host:port`` of the keeper's data plane; None if it has none."""
        address: str | None = self._link.call("address").result["address"]
        return address

    def token(self) -> bytes:
        """The job's token, for data planes.

        Raises:
            KeeperError: it cannot be read.
        """
        try:
            return self._place.token()
        except OSError as error:
            raise KeeperError(
                f"the token of job {self._place.job} cannot be read ({error}): start the keeper "
                "again"
            ) from None

    def tell(self, stats: Mapping[str, Any]) -> None:
        """Have the keeper show numbers of this rank in its status; does not wait.

        Args:
            stats: values that JSON can carry, by name.
        """
        self._link.submit("tell", stats=dict(stats))

    def status(self) -> dict[str, Any]:
        """How the keeper is: see ``control.status``."""
        return {"job": self._place.job, **self._link.call("status").result}

    def __enter__(self) -> "KeeperMemory":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(finished=kind is None)

    # Connections

    def _greet(self, ask: Ask) -> None:
        """Say who this is, and give back whatever the keeper may have lost."""
        ask({"do": "hello", "rank": self._rank, "world_size": self._world_size}, [])
        with self._lock:
            sets, current, pins = list(self._sets), self._current, list(self._pins)
            locks, order = dict(self._locks), self._orphan_order
        for mapped in sets:
            offer = {"do": "adopt", **mapped.shape.as_json(), "current": mapped is current}
            ask(offer, mapped.fds)
        for pin in pins:
            told = ask({"do": "pin_again", "set_id": pin.set_id, "index": pin.index}, [])
            pin.number = told["pin"]
        for directory, fd in locks.items():
            ask({"do": "lend_lock", "directory": directory}, [fd])
        if order is not None:
            ask({"do": "orphan_order", "order": order.as_json()}, [])

    def _forget(self) -> None:
        """In a child that was forked, which may live longer than its parent: keep nothing alive."""
        self._lock = threading.Lock()  # a thread that is not here may hold the other one
        self._closed = True
        self._link.forget()
        for mapped in self._sets:
            close_all(mapped.fds)
        close_all(self._locks.values())
        self._sets, self._current, self._locks = [], None, {}

    def _flushed(self, asked: "Future[Reply]", future: "Future[Flushed]") -> None:
        try:
            coded = asked.result().result
            result = Flushed(**{**coded, "step_id": StepId(*coded["step_id"])})
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(result)
        with self._lock:
            self._flushes.discard(future)

    def _map_holdings(self, reply: Reply) -> list[Holding]:
        found: list[Holding] = []
        try:
            for told, fd in zip(reply.result["slots"], reply.fds, strict=True):
                pin = _Pin(told["set_id"], told["index"], told["pin"])
                with self._lock:
                    self._pins.append(pin)
                memory = segments.map_slot(fd, writable=False)
                seal = read_seal(memory)
                if seal is None:  # captured into just now
                    self._unpin(pin)
                    continue
                found.append(
                    Holding(
                        seal=seal,
                        part=part_of(memory, seal),
                        memory=memory,
                        _release=lambda pin=pin: self._unpin(pin),  # type: ignore[misc]
                    )
                )
        finally:
            close_all(reply.fds)
        return found

    def _unpin(self, pin: _Pin) -> None:
        with self._lock:
            if pin not in self._pins:
                return
            self._pins.remove(pin)
        with contextlib.suppress(EverstepError):
            self._link.submit("release", pin=pin.number)


def _forget_in_child() -> None:
    for memory in list(_OPEN):
        memory._forget()


os.register_at_fork(after_in_child=_forget_in_child)


def prefer_dying(score: int = 500) -> int:
    """Have the kernel kill this process before its keeper when memory runs out.

    Args:
        score: the least ``oom_score_adj`` of this process, up to 1000; it is never lowered.

    Returns:
        What it is now.
    """
    now = int(_OOM_SCORE_ADJ.read_text())
    if now < score:
        _OOM_SCORE_ADJ.write_text(str(score))
    return max(now, score)
