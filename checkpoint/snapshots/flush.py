"""From the sealed slot of one rank to a committed checkpoint; needs no trainer to be alive.

Every rank's flusher writes the pack that lies in its slot and votes with the part beside it. Rank 0
waits for all votes and commits; the others wait for the manifest. A rank that fails says so with
its vote, which all see. Whoever is killed at any point may be run again: what it left half-written
is replaced, what it left whole is taken as it is.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from everstep.checkpoint.ballot import publish_step
from everstep.checkpoint.collective import describe
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.direct_io import ALIGN_BYTES, ByteArray, StreamWriter
from everstep.checkpoint.errors import (
    CheckpointError,
    EverstepError,
    ManifestError,
    SaveFailedError,
    SlotMemoryError,
)
from everstep.checkpoint.lineage import StepId, decode_generation
from everstep.checkpoint.manifest import Part, decode_part
from everstep.checkpoint.records import read_record
from everstep.checkpoint.snapshots.memory import Flushed, FlushOrder
from everstep.checkpoint.snapshots.slot_format import (
    Seal,
    owner_digest,
    pack_of,
    part_of,
    read_seal,
    round_up,
)
from everstep.checkpoint.step_keys import (
    generation_key,
    is_committed,
    part_key,
    step_key,
)
from everstep.checkpoint.stores import open_store
from everstep.checkpoint.tally import Tally

CHUNK_BYTES = 8 * 2**20
"""Written at a time, when nothing limits the rate."""
NICE = 10
"""Of threads that flush at a rate: they have time, and trainers have none to give."""
CHUNKS_PER_S = 8
"""How evenly a limited rate is kept: chunks are no larger than what is due in 1/8 s."""
NAP_S = 0.1
"""How long a pause may be before it is asked again whether to go on."""
LOCAL_POLL_S = 0.03
"""Between two looks at a local folder."""
REMOTE_POLL_S = 1.0
RETRY_S = 1.0
"""After an error of the store."""
LOOKING_SHARE = 10
"""Those that wait for the manifest spend a tenth of their time at most on reading votes."""


def never() -> bool:
    """Nothing is cancelled."""
    return False


def flush_slot(
    slot: ByteArray,
    order: FlushOrder,
    *,
    on_bytes: Callable[[int], None] | None = None,
    cancelled: Callable[[], bool] = never,
) -> Flushed:
    """Make the snapshot in a slot durable; returns when its checkpoint is committed.

    May be called again after it, or its process, ended in any way.

    Args:
        slot: sealed; nobody writes to it meanwhile. Local files are written straight from it.
        order: what to write where; where it has a rate, the calling thread gives way to others
            from now on.
        on_bytes: called with the bytes of the pack that are written so far.
        cancelled: asked between pieces, at most 0.1 s (or a write of 8 MiB) apart. While the pack
            is being written, a flush that is cancelled fails for all ranks.

    Raises:
        SlotMemoryError: the slot does not hold what the order is about; nothing was written.
        SaveFailedError: this rank or another one could not write, or was too late; causes by rank,
            as far as votes tell them by now. No rank's pack is kept.
        CheckpointError: the directory belongs to another run; or the flush was cancelled after this
            rank had voted: the other ranks may still commit it.
        OSError: the store could not be reached again until the deadline.
        ValueError: the order's rate is not positive.
    """
    begun_s = time.monotonic()
    if order.rate_bytes_per_s is not None:
        _give_way()
    seal, part, pack_file = _snapshot(slot, order)
    store = open_store(
        order.directory,
        storage_options=order.storage_options,
        single_writer=order.single_writer,
    )
    directory = CheckpointDirectory(store)
    flush = _Flush(slot, order, seal, part, f"{step_key(order.step_id)}/{pack_file}", directory)
    size_bytes, warning = flush.run(on_bytes, cancelled)
    return Flushed(
        step_id=order.step_id,
        path=directory.describe(order.step_id),
        size_bytes=size_bytes,
        duration_s=time.monotonic() - begun_s,
        warning=warning,
    )


def _give_way() -> None:
    """Have this thread run after those that compute, where the system lets it."""
    with contextlib.suppress(OSError, AttributeError):
        thread = threading.get_native_id()
        if os.getpriority(os.PRIO_PROCESS, thread) < NICE:
            os.setpriority(os.PRIO_PROCESS, thread, NICE)


def _snapshot(slot: ByteArray, order: FlushOrder) -> tuple[Seal, bytes, str]:
    """What an order is about: the seal, the part, and the name of the pack's file."""
    if order.rate_bytes_per_s is not None and order.rate_bytes_per_s <= 0:
        raise ValueError(f"rate_bytes_per_s={order.rate_bytes_per_s}: it is more than 0, or None")
    wanted = _named(order.step_id, order.rank, order.world_size)
    seal = read_seal(slot)
    if seal is None:
        raise SlotMemoryError(
            f"a slot that was to be flushed holds no sealed snapshot, expected {wanted}: flush a "
            "slot after it was sealed and before it is captured into again"
        )
    found = _named(seal.step_id, seal.rank, seal.world_size)
    if found != wanted:
        raise SlotMemoryError(
            f"a slot that was to be flushed holds {found}, expected {wanted}: give the order for "
            "the slot that holds the step"
        )
    data = part_of(slot, seal)
    try:
        part = decode_part(data, "the part in the slot")
        good = _is_of(part, seal)
    except ManifestError as e:
        raise SlotMemoryError(f"the slot of {wanted} cannot be flushed: {e}") from None
    if not good:
        raise SlotMemoryError(
            f"the slot of {wanted} cannot be flushed: its part is about "
            f"{_named(StepId(part.generation, part.step), part.rank, part.world_size)} with a pack "
            f"of {part.pack.size_bytes} bytes, its pack has {seal.pack_bytes}"
        )
    return seal, data, part.pack.file


def _named(step_id: StepId, rank: int, world_size: int) -> str:
    return (
        f"step {step_id.step} of generation {step_id.generation}, rank {rank} of {world_size} ranks"
    )


def _is_of(part: Part, seal: Seal) -> bool:
    said = (StepId(part.generation, part.step), part.rank, part.world_size, part.pack.size_bytes)
    return said == (seal.step_id, seal.rank, seal.world_size, seal.pack_bytes)


class _Cancelled(EverstepError):
    """The flush is to end."""

    def __str__(self) -> str:
        return "its flush was cancelled"


class _Flush:
    """One call of ``flush_slot``."""

    def __init__(
        self,
        slot: ByteArray,
        order: FlushOrder,
        seal: Seal,
        part: bytes,
        pack_key: str,
        directory: CheckpointDirectory,
    ) -> None:
        self._slot, self._order, self._seal, self._part = slot, order, seal, part
        self._step_id, self._rank = order.step_id, order.rank
        self._pack_key, self._directory, self._store = pack_key, directory, directory.store
        self._cancelled: Callable[[], bool] = never
        self._tally = Tally(self._store, self._step_id, order.world_size)
        self._poll_s = LOCAL_POLL_S if self._directory.has_lock else REMOTE_POLL_S

    def run(
        self, on_bytes: Callable[[int], None] | None, cancelled: Callable[[], bool]
    ) -> tuple[int, str | None]:
        """Size of the checkpoint in bytes, and what to warn of."""
        self._cancelled = cancelled
        try:
            owned = self._is_owned()
            if owned and not is_committed(self._store, self._step_id):
                if self._rank == 0 and not self._directory.has_lock:
                    self._directory.check_newest(self._step_id.generation)
                if not self._has_voted():
                    self._write(on_bytes)
                    self._directory.put_vote(self._step_id, self._rank, self._part)
        except Exception as e:
            self._fail(e)
        if not owned:
            raise CheckpointError(
                f"{self._directory.describe()} belongs to another run than the snapshot of step "
                f"{self._step_id.step}: its generation {self._step_id.generation} was begun by "
                "another owner; flush into the directory that the snapshot is from"
            )
        try:
            return self._settled()
        except _Cancelled:
            raise CheckpointError(
                f"the flush of step {self._step_id.step} was cancelled while it waited for other "
                "ranks: they may still commit it; see what is committed, or flush it again"
            ) from None

    # Writing

    def _is_owned(self) -> bool:
        """Whether the directory is of the run that the snapshot is of."""
        key = generation_key(self._step_id.generation)
        try:
            record = decode_generation(read_record(self._store, key), self._store.describe(key))
        except ManifestError:  # lost or damaged, which the directory can live with
            return True
        return owner_digest(record.owner) == self._seal.owner

    def _has_voted(self) -> bool:
        """Whether there is a vote of this rank, for this snapshot or of a failure."""
        key = part_key(self._step_id, self._rank)
        if self._store.size(key) is None:
            return False
        self._tally.look()
        if self._rank not in self._tally.causes and read_record(self._store, key) != self._part:
            raise CheckpointError(
                f"{self._store.describe(key)} is the vote of another attempt to save step "
                f"{self._step_id.step}: a step is saved once; save under a later step"
            )
        return True

    def _write(self, on_bytes: Callable[[int], None] | None) -> None:
        """Write the pack, durably; what an earlier attempt left of it did not get its vote."""
        key, pack = self._pack_key, pack_of(self._slot, self._seal)
        if self._store.size(key) is not None:
            self._store.delete(key)
        path = self._store.local_path(key)
        if path is None:
            with self._store.writer(key, len(pack)) as out:
                for chunk in self._chunks(pack, on_bytes):
                    out.append(chunk)
                out.finish()
        else:
            self._directory.begin_step(self._step_id)
            with StreamWriter(path, staging_bytes=ALIGN_BYTES) as file:
                for chunk in self._chunks(pack, on_bytes):
                    file.write_from(chunk)
                file.finish()
        if read_seal(self._slot) != self._seal:
            raise SlotMemoryError(
                f"the slot of step {self._step_id.step} was overwritten while it was flushed: "
                "capture into a slot only when its flush has ended"
            )

    def _chunks(
        self, pack: ByteArray, on_bytes: Callable[[int], None] | None
    ) -> Iterator[ByteArray]:
        """Pieces of the pack, whole pages but for the last, when each is due."""
        rate, begun_s = self._order.rate_bytes_per_s, time.monotonic()
        step = CHUNK_BYTES if rate is None else min(CHUNK_BYTES, round_up(int(rate / CHUNKS_PER_S)))
        step = max(step, ALIGN_BYTES)
        for begin in range(0, len(pack), step):
            if rate is not None:
                self._sleep_until(begun_s + begin / rate)
            self._check_cancelled()
            yield pack[begin : begin + step]
            if on_bytes is not None:
                on_bytes(min(begin + step, len(pack)))

    # Waiting

    def _settled(self) -> tuple[int, str | None]:
        """Wait for the commit; on rank 0, for the votes, and commit."""
        deadline_s = time.monotonic() + self._order.deadline_s
        look_at_s = 0.0
        while True:
            now_s, pause_s = time.monotonic(), self._poll_s
            try:
                if is_committed(self._store, self._step_id):
                    return self._committed()
                if now_s >= look_at_s:
                    self._look()
                    if self._rank == 0 and self._tally.complete:
                        return self._commit()
                    took_s = time.monotonic() - now_s
                    look_at_s = 0.0 if self._rank == 0 else now_s + LOOKING_SHARE * took_s
            except OSError:  # a store that is away for a while
                pause_s = max(pause_s, RETRY_S)
            if time.monotonic() >= deadline_s:
                return self._too_late()
            self._sleep_until(min(deadline_s, time.monotonic() + pause_s))

    def _look(self) -> None:
        self._tally.look()
        if self._tally.causes:
            self._raise_causes(self._tally.causes)
        if self._rank not in self._tally.voted:
            raise CheckpointError(
                f"{self._directory.describe(self._step_id)} was deleted before its commit was "
                "seen: it was no longer kept, or taken for garbage; flush a newer snapshot"
            )

    def _committed(self) -> tuple[int, str | None]:
        if self._rank == 0:  # an earlier attempt may have been killed before it deleted old ones
            return self._commit()
        return self._directory.manifest(self._step_id).size_bytes, None

    def _commit(self) -> tuple[int, str | None]:
        manifest, warning = publish_step(
            self._directory, self._step_id, self._order.world_size, self._order.keep
        )
        return manifest.size_bytes, warning

    def _too_late(self) -> tuple[int, str | None]:
        """Some rank has not voted in time, or rank 0 has not committed what it could."""
        causes = self._directory.give_up(self._step_id, self._order.world_size)
        if causes:
            self._raise_causes(causes)
        # All have voted, and whoever sees all votes may publish.
        return self._directory.commit(self._step_id, self._order.world_size).size_bytes, None

    # Failing

    def _fail(self, error: Exception) -> NoReturn:
        """Tell the other ranks; what was written goes once it is sure that it cannot count."""
        with contextlib.suppress(OSError, CheckpointError):
            with contextlib.suppress(FileExistsError):
                self._directory.put_failure(self._step_id, self._rank, describe(error))
            self._tally.look()
        causes = self._tally.causes or {self._rank: describe(error)}
        if self._tally.causes:
            self._drop()
        raise SaveFailedError(self._step_id.step, causes) from error

    def _raise_causes(self, causes: dict[int, str]) -> NoReturn:
        self._drop()
        raise SaveFailedError(self._step_id.step, causes)

    def _drop(self) -> None:
        """Delete the own pack: a step with a failed vote is never committed."""
        with contextlib.suppress(OSError):
            self._store.delete(self._pack_key)

    def _check_cancelled(self) -> None:
        if self._cancelled():
            raise _Cancelled

    def _sleep_until(self, due_s: float) -> None:
        while (left_s := due_s - time.monotonic()) > 0:
            self._check_cancelled()
            time.sleep(min(left_s, NAP_S))
