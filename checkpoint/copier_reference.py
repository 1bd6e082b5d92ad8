"""The copier of `copier` once more, slow and obvious, as the measure of the fast one.

Same interface, without a thread of its own: who helps or waits copies, block after block. Arguments
are taken to be valid; rates and priorities change nothing.
"""

import ctypes
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from everstep.checkpoint.copier import CopyStats
from everstep.checkpoint.kernels_reference import box_view, crc32c


class CopyPlan:
    """Which boxes follow each other in the data."""

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
        """One entry per fragment in each sequence, as in `copier`."""
        self.fragments = list(zip(starts, shapes, strides_bytes, item_bytes, strict=True))
        self.data_bytes = data_bytes
        self.block_bytes = block_bytes

    @property
    def n_blocks(self) -> int:
        """How many blocks the data has."""
        return -(-self.data_bytes // self.block_bytes)


def _source(
    address: int, strides_bytes: Sequence[int], shape: Sequence[int], item_bytes: int
) -> NDArray[np.uint8]:
    """The bytes of a box at an address, flat; a copy."""
    reaches = [stride * (n - 1) for stride, n in zip(strides_bytes, shape, strict=True)]
    lowest = sum(min(reach, 0) for reach in reaches)
    highest = sum(max(reach, 0) for reach in reaches) + item_bytes
    memory = (ctypes.c_uint8 * (highest - lowest)).from_address(address + lowest)
    buffer = np.ctypeslib.as_array(memory)
    return box_view(buffer, -lowest, strides_bytes, shape, item_bytes).flatten()


class CopyJob:
    """One copy of everything in a plan."""

    def __init__(
        self,
        plan: CopyPlan,
        addresses: NDArray[np.uint64],
        dst: NDArray[np.uint8],
        crcs: NDArray[np.uint32],
    ) -> None:
        self._plan, self._addresses, self._dst, self._crcs = plan, addresses, dst, crcs
        self._blocks_done = 0
        self._cancelled = False
        self._started_s = time.monotonic()
        self._elapsed_s = 0.0
        self._help_s = 0.0

    @property
    def done(self) -> bool:
        """Whether everything is copied."""
        return self._blocks_done == self._plan.n_blocks

    @property
    def copied_bytes(self) -> int:
        """Bytes copied so far."""
        return min(self._blocks_done * self._plan.block_bytes, self._plan.data_bytes)

    def help(self) -> float:
        """Copy everything that is left; returns the seconds it took."""
        begin_s = time.monotonic()
        while not self.done:
            if self._cancelled:
                raise RuntimeError("the copy was cancelled: what it wrote is not complete")
            self._copy_block(self._blocks_done)
        help_s = time.monotonic() - begin_s
        self._help_s += help_s
        return help_s

    def wait(self, timeout_s: float) -> bool:
        """Copy blocks until everything is copied or the time is up; returns `done`."""
        end_s = time.monotonic() + timeout_s
        while not self.done and not self._cancelled and time.monotonic() < end_s:
            self._copy_block(self._blocks_done)
        return self.done

    def set_rate(self, bytes_per_s: float | None) -> None:
        """Nothing: no thread is there to be slowed."""

    def cancel(self) -> None:
        """Copy no more."""
        self._cancelled = True

    def stats(self) -> CopyStats:
        """What the job has cost so far; all of it is help."""
        elapsed_s = self._elapsed_s if self.done else time.monotonic() - self._started_s
        return CopyStats(
            background_cpu_s=0.0,
            background_bytes=0,
            help_s=self._help_s,
            help_bytes=self.copied_bytes,
            elapsed_s=elapsed_s,
        )

    def _copy_block(self, block: int) -> None:
        begin = block * self._plan.block_bytes
        end = min(begin + self._plan.block_bytes, self._plan.data_bytes)
        for fragment, address in zip(self._plan.fragments, self._addresses, strict=True):
            start, shape, strides_bytes, item_bytes = fragment
            stop = start + int(np.prod(shape, dtype=np.int64)) * item_bytes
            low, high = max(begin, start), min(end, stop)
            if low < high:
                flat = _source(int(address), strides_bytes, shape, item_bytes)
                self._dst[low:high] = flat[low - start : high - start]
        self._crcs[block] = crc32c(self._dst[begin:end])
        self._blocks_done = block + 1
        self._elapsed_s = time.monotonic() - self._started_s


class Copier:
    """A pool of no threads."""

    def __init__(self, threads: int = 1, nice: int = 0) -> None:
        """As in `copier`; both arguments change nothing."""
        self._jobs: list[CopyJob] = []

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
        """Prepare a copy."""
        job = CopyJob(plan, addresses, dst, crcs)
        self._jobs.append(job)
        return job

    def close(self) -> None:
        """Cancel the jobs that are not done."""
        for job in self._jobs:
            job.cancel()
