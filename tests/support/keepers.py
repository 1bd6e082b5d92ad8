"""Keepers for tests: in a thread, or as processes; what is sealed; that nothing is left."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.errors import SaveFailedError, SlotMemoryError
from everstep.checkpoint.keeper import segments
from everstep.checkpoint.keeper.client import KeeperMemory
from everstep.checkpoint.keeper.deputy import Deputy
from everstep.checkpoint.keeper.flushes import FlushSlot
from everstep.checkpoint.keeper.place import KeeperPlace
from everstep.checkpoint.keeper.server import DataPlaneFactory, Keeper
from everstep.checkpoint.kernels import crc32c
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.snapshots.memory import Flushed, FlushOrder
from everstep.checkpoint.snapshots.slot_format import (
    PAGE_BYTES,
    Seal,
    owner_digest,
    pack_of,
    read_seal,
    unseal,
    write_seal,
)

PROGRAM = "tests.support.keeper_program"
SLOT_BYTES = 16 * PAGE_BYTES
_PACK_START = 2 * PAGE_BYTES
_OWNER = owner_digest("a run of tests")


def seal(slot: ByteArray, step: int, *, rank: int = 0, world_size: int = 1) -> StepId:
    """Fill a slot with what can be told from the step and the rank, and seal it."""
    step_id, part = StepId(1, step), f'{{"step": {step}, "rank": {rank}}}'.encode()
    unseal(slot)
    slot[_PACK_START:] = pack_byte(step, rank)
    write_seal(
        slot,
        part,
        Seal(
            step_id=step_id,
            rank=rank,
            world_size=world_size,
            owner=_OWNER,
            part_start=PAGE_BYTES,
            part_bytes=len(part),
            pack_start=_PACK_START,
            pack_bytes=len(slot) - _PACK_START,
            part_crc32c=crc32c(part),
        ),
    )
    return step_id


def pack_byte(step: int, rank: int) -> int:
    """What the pack of a step is full of."""
    return (7 * step + rank) % 251 + 1


def holds(slot: ByteArray, step: int, rank: int = 0) -> bool:
    """Whether a slot holds exactly what ``seal`` has put into it."""
    found = read_seal(slot)
    return (
        found is not None
        and found.step_id.step == step
        and bool((pack_of(slot, found) == pack_byte(step, rank)).all())
    )


def order(directory: Path, step: int, *, rank: int = 0, world_size: int = 1) -> FlushOrder:
    """An order to flush what ``seal`` has sealed."""
    return FlushOrder(
        directory=str(directory),
        step_id=StepId(1, step),
        rank=rank,
        world_size=world_size,
        keep=3,
        deadline_s=20.0,
    )


def flush_to_file(
    slot: ByteArray,
    order: FlushOrder,
    *,
    on_bytes: Callable[[int], None] | None = None,
    cancelled: Callable[[], bool],
) -> Flushed:
    """Writes DIRECTORY/STEP-RANK; waits while there is DIRECTORY/hold, fails if there is ``fail``.

    May be called again: a file that is there counts as durable.
    """
    directory = Path(order.directory)
    path = directory / f"{order.step_id.step}-{order.rank}"
    if not path.exists():
        found = read_seal(slot)
        if found is None or found.step_id != order.step_id:
            raise SlotMemoryError(f"the slot does not hold step {order.step_id.step}")
        with open(directory / "tries", "a") as tries:
            tries.write(f"{order.step_id.step}-{order.rank}\n")
        while (directory / "hold").exists() and not cancelled():
            time.sleep(0.005)
        if (directory / "fail").exists() or cancelled():
            raise SaveFailedError(order.step_id.step, {order.rank: "No space left on device"})
        pack = pack_of(slot, found)
        path.with_suffix(".tmp").write_bytes(pack.tobytes())
        path.with_suffix(".tmp").rename(path)
        if on_bytes is not None:
            on_bytes(len(pack))
    return Flushed(
        step_id=order.step_id, path=str(path), size_bytes=path.stat().st_size, duration_s=0.1
    )


def flushed(directory: Path) -> list[str]:
    """What ``flush_to_file`` has written."""
    return sorted(p.name for p in directory.glob("*-*") if p.suffix != ".tmp")


class KeeperThread:
    """A keeper in this process, without a supervisor; a context manager."""

    def __init__(
        self,
        place: KeeperPlace,
        *,
        budget_bytes: int = 2**30,
        linger_s: float = 60.0,
        flush: FlushSlot = flush_to_file,
        data_plane_factory: DataPlaneFactory | None = None,
    ) -> None:
        place.make()
        self.place = place
        self._listener = place.listen()
        self.lines: list[str] = []
        self.keeper = Keeper(
            self._listener,
            Deputy(None),
            budget_bytes=budget_bytes,
            linger_s=linger_s,
            flush=flush,
            log=self.lines.append,
            token=place.make_token(),
            data_plane_factory=data_plane_factory,
        )
        self._thread = threading.Thread(target=self.keeper.run, daemon=True)
        self._thread.start()

    def connect(self, rank: int = 0, world_size: int = 1, timeout_s: float = 10.0) -> KeeperMemory:
        """A client of it."""
        return KeeperMemory(
            self.place.job,
            rank=rank,
            world_size=world_size,
            place=self.place.root,
            timeout_s=timeout_s,
        )

    def wait(self, timeout_s: float = 20.0) -> None:
        """Until it has ended by itself."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the keeper has not ended"

    def end(self) -> None:
        """As ``everstep keeper stop --now``; may be called twice."""
        self.keeper._house.stop("now")
        self.keeper._post(lambda: None)
        self.wait()
        self._listener.close()

    def __enter__(self) -> "KeeperThread":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def eventually(condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
    """Wait until something is true."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not become true in time"
        time.sleep(0.005)


def result(future: "Future[Flushed]") -> Flushed:
    """Of a flush, in time."""
    return future.result(20)


def inodes_of(memory: KeeperMemory) -> set[int]:
    """Of the slots that a client has mapped."""
    return {os.fstat(fd).st_ino for mapped in memory._sets for fd in mapped.fds}


def users_of(inodes: set[int]) -> set[int]:
    """Processes that have one of these slots open or mapped, as far as /proc can be read."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
            if any(_is_slot(line, inodes) for line in lines):
                found.add(int(pid))
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if segments.NAME in os.readlink(fd) and fd.stat().st_ino in inodes:
                        found.add(int(pid))
    return found


def _is_slot(line: str, inodes: set[int]) -> bool:
    return segments.NAME in line and int(line.split()[4]) in inodes


def processes_of(place: Path) -> Iterator[int]:
    """Supervisors and keepers that serve a place."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if f"--place={place}".encode() in words:
                yield int(pid)
