"""The ways of the snapshot benchmark that are a few lines, and the list of all."""

import ctypes
import os
from collections.abc import Callable, Mapping
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
    DLROVER,
    DURABLE,
    MEMORY,
    NONE,
    TORCH,
)
from snapshot_inflation_way import Place, Way


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
