"""Copies live memory into the data of a pack in the background, in native threads.

A *plan* says once per layout which strided boxes follow each other in the data. A *job* copies them
from the addresses that they have now, and checksums every block on the way: the threads of the
copier work on it at a chosen pace while the caller computes, and a caller that must have the copy
now *helps*: it takes part at full speed until all is copied. The unit of work is a block.

The interpreter lock is released in every call that may take long. The slow twin is
`copier_reference`.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from everstep import _native


@dataclass(frozen=True, kw_only=True)
class CopyStats:
    """What a job has cost so far."""

    background_cpu_s: float
    """Processor time of the background threads."""
    background_bytes: int
    """Bytes that they copied."""
    help_s: float
    """Wall time of all calls of `help` that are over, waits included."""
    help_bytes: int
    """Bytes that helping callers copied."""
    elapsed_s: float
    """From the start until everything was copied, or until now."""


class CopyPlan:
    """Which boxes follow each other in the data, without gaps; immutable."""

    def __init__(
        self,
        starts: Sequence[int],
        shapes: Sequence[Sequence[int]],
        strides_bytes: Sequence[Sequence[int]],
        item_bytes: Sequence[int],
        *,
        data_bytes: int,
        block_bytes: int,
    ) -> None:
        """One entry per fragment in each sequence.

        Args:
            starts: offset of each fragment in the data: where the one before it ends.
            shapes: in items; without dimensions, or empty, as it comes.
            strides_bytes: of the sources, one per dimension; of any sign, or zero.
            item_bytes: size of an item.
            data_bytes: size of the data: the sum of all fragments.
            block_bytes: each block of so many bytes gets a CRC-32C; the last may be short.

        Raises:
            ValueError: something does not fit; the message says which fragment and why.
        """
        self.data_bytes = data_bytes
        self.block_bytes = block_bytes
        self._native = _native.CopyPlan(
            starts, shapes, strides_bytes, item_bytes, data_bytes, block_bytes
        )

    @property
    def n_blocks(self) -> int:
        """How many blocks the data has."""
        return self._native.blocks


class CopyJob:
    """One copy of everything in a plan; made by `Copier.start`. Thread-safe.

    A job that is dropped is cancelled first. In a forked child only `done`, `copied_bytes` and
    `stats` can be asked, and tell how things were at the fork; the rest raises RuntimeError.
    """

    def __init__(self, native: _native.CopyJob, copier: "Copier") -> None:
        self._native = native
        self._copier = copier  # an open copier is closed with its last job, not before

    @property
    def done(self) -> bool:
        """Whether everything is copied: all bytes and checksums are there, no source is read."""
        return self._native.done

    @property
    def copied_bytes(self) -> int:
        """Bytes copied so far."""
        return self._native.copied_bytes

    def help(self) -> float:
        """Take part, at full speed, until everything is copied; returns the seconds it took.

        What background threads have in hand is waited for, asleep.

        Raises:
            RuntimeError: the job is cancelled, so that the copy never gets complete.
        """
        return self._native.help()

    def wait(self, timeout_s: float) -> bool:
        """Sleep until everything is copied, or the job is cancelled; returns `done`.

        Raises:
            ValueError: the timeout is negative.
        """
        return self._native.wait(timeout_s)

    def set_rate(self, bytes_per_s: float | None) -> None:
        """How fast the background threads copy together: None: full speed; 0: they pause.

        Whoever helps does not care. The rate may change at any time.

        Raises:
            ValueError: the rate is negative or not finite.
        """
        self._native.set_rate(bytes_per_s)

    def cancel(self) -> None:
        """Stop all threads after the block that each has in hand, and wait for that.

        `done` stays False, if it was; what was written stays, incomplete.
        """
        self._native.cancel()

    def stats(self) -> CopyStats:
        """What the job has cost so far."""
        native = self._native.stats()
        return CopyStats(
            background_cpu_s=native["background_cpu_s"],
            background_bytes=int(native["background_bytes"]),
            help_s=native["help_s"],
            help_bytes=int(native["help_bytes"]),
            elapsed_s=native["elapsed_s"],
        )


class Copier:
    """A pool of background threads, which start with the first job. Thread-safe.

    Jobs are copied one after the other, in the order of their starts. The threads are those of the
    process that made the copier: a forked child needs a copier of its own.
    """

    def __init__(self, threads: int = 1, nice: int = 0) -> None:
        """Plan a pool.

        Args:
            threads: how many background threads, at least 1.
            nice: 0 to 19, of these threads only (Linux): with 19 they use little more than the
                processors that are idle. Ignored where the system refuses it.

        Raises:
            ValueError: an argument is out of its range.
        """
        native = _native.Copier(threads, nice)
        self._native = native
        self._close = weakref.finalize(self, native.close)  # at the latest when Python ends

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def start(
        self,
        plan: CopyPlan,
        addresses: NDArray[np.uint64],
        dst: NDArray[np.uint8],
        crcs: NDArray[np.uint32],
        *,
        bytes_per_s: float | None = None,
    ) -> CopyJob:
        """Begin to copy; returns at once.

        The caller vouches that the memory at the addresses stays, unchanged, until the job is done
        or cancelled. The job keeps `dst` and `crcs` alive.

        Args:
            plan: what is where.
            addresses: of the item with index zero in every dimension, one per fragment; those of
                empty fragments are ignored.
            dst: the data, `plan.data_bytes` long; shares no memory with the sources.
            crcs: `plan.n_blocks` long, receives the CRC-32C of each block.
            bytes_per_s: see `CopyJob.set_rate`.

        Raises:
            ValueError: an argument does not fit the plan; nothing was touched.
            TypeError: an array has another dtype or number of dimensions, has gaps or is read-only.
            RuntimeError: the copier is closed, belongs to the process that this one was forked
                from, or the system gives it no thread.
        """
        native = self._native.start(plan._native, addresses, dst, crcs, bytes_per_s)
        return CopyJob(native, self)

    def close(self) -> None:
        """Cancel the jobs that are not done, and end the threads; may be called twice."""
        self._close()
