"""The ways of the snapshot benchmark that are a few lines, and the list of all."""

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from snapshot_inflation_dcp import DcpBest, DcpDefault, DcpStaging, DcpSync
from snapshot_inflation_dlrover import FlashCheckpoint
from snapshot_inflation_ours import DurableSnapshots, Snapshots
from snapshot_inflation_training import Training
from snapshot_inflation_turns import (
    COPY,
    DCP_BEST,
    DCP_BEST_5,
    DCP_DEFAULT,
    DCP_STAGING,
    DCP_SYNC,
    DISK,
    DLROVER,
    DURABLE,
    MEMORY,
    NONE,
    TORCH,
)
from snapshot_inflation_way import Place, Way

from everstep.checkpoint.direct_io import ALIGN_BYTES, ByteArray, StreamWriter

_CHUNK_BYTES = 8 * 2**20


def page_aligned(size_bytes: int) -> ByteArray:
    """Touched memory that begins at a page."""
    pages = np.frombuffer(mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE), np.uint8)
    pages.fill(1)
    return pages


class CopyFloor(Way):
    """The physical limit: every byte copied once, by the main thread, into touched memory."""

    def before_training(self) -> None:
        """Touch the memory."""
        self._slot = np.zeros(self.training.state_bytes, np.uint8)
        self._slot.fill(1)
        self._copies = []
        address = self._slot.ctypes.data
        for tensor in self.training.local_tensors.values():
            if not tensor.is_contiguous():
                raise AssertionError("the copy floor knows contiguous tensors only")
            self._copies.append((address, tensor.data_ptr(), tensor.nbytes))
            address += tensor.nbytes

    def after_step(self, step: int) -> None:
        """Copy."""
        for target, source, size_bytes in self._copies:
            ctypes.memmove(target, source, size_bytes)


class DiskFloor(CopyFloor):
    """The limit with storage: the copy, and every fifth step written past the page cache by a
    thread, over half of the time until the next."""

    def before_training(self) -> None:
        """Touch the memory, which begins at a page."""
        super().before_training()
        self._writing: threading.Thread | None = None
        self._pages = page_aligned(self.training.state_bytes)
        self._begun_s: list[float] = []

    def after_step(self, step: int) -> None:
        """Copy; at every fifth step, write."""
        super().after_step(step)
        self._begun_s.append(time.monotonic())
        if step % 5 == 0:
            self.drain()
            recent_s = self._begun_s[-3:]
            step_s = (recent_s[-1] - recent_s[0]) / max(1, len(recent_s) - 1)
            path = self.place.disk / f"raw-{self.place.rank}-{step}"
            self._writing = threading.Thread(target=self._write, args=(path, 2.5 * step_s))
            self._writing.start()

    def _write(self, path: Path, spread_s: float) -> None:
        begun_s, size_bytes = time.monotonic(), len(self._pages)
        with StreamWriter(path, staging_bytes=ALIGN_BYTES) as out:
            for begin in range(0, size_bytes, _CHUNK_BYTES):
                due_s = begun_s + spread_s * begin / size_bytes
                time.sleep(max(0.0, due_s - time.monotonic()))
                out.write_from(self._pages[begin : begin + _CHUNK_BYTES])
            out.finish()
        path.unlink()

    def drain(self) -> None:
        """Until it is written."""
        if self._writing is not None:
            self._writing.join()

    def close(self) -> None:
        """As ``drain``."""
        self.drain()


class TorchSave(Way):
    """``torch.save`` of this rank's tensors into memory (tmpfs), the newest replacing the last."""

    def after_step(self, step: int) -> None:
        """Write beside the last one, then take its place."""
        path = self.place.memory / f"rank-{self.place.rank}"
        torch.save(self.training.local_tensors, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)


WAYS: Mapping[str, Callable[[Training, Place], Way]] = MappingProxyType(
    {
        NONE: Way,
        COPY: CopyFloor,
        DISK: DiskFloor,
        MEMORY: Snapshots,
        DURABLE: DurableSnapshots,
        DCP_BEST: DcpBest,
        DCP_BEST_5: DcpBest,
        DCP_STAGING: DcpStaging,
        DCP_DEFAULT: DcpDefault,
        DCP_SYNC: DcpSync,
        TORCH: TorchSave,
        DLROVER: FlashCheckpoint,
    }
)
