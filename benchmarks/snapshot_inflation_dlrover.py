"""DLRover's Flash Checkpoint in the snapshot benchmark, where ``pip install dlrover`` was done.

Every rank copies its tensors into shared memory that outlives it, with the engine that DLRover has
for states of any kind; nothing is written to the disk. Its agent runs for the length of a block.
"""

import importlib
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata

import torch.distributed as dist
from snapshot_inflation_turns import RANKS
from snapshot_inflation_way import Way

_ENGINE = "dlrover.trainer.torch.flash_checkpoint.full_ckpt_engine"
_SOCKETS = "/tmp/ckpt_sock"
"""DLRover's own choice."""
_AGENT = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
from dlrover.trainer.torch.flash_checkpoint.engine import start_async_save
start_async_save()
"""
"""Ends with the rank that has started it."""


def why_missing() -> str | None:
    """Why it cannot be measured here; None if it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # packages that it needs are deprecated
            importlib.import_module(_ENGINE)
    except ImportError as error:
        return f"{error}: pip install dlrover"
    return None


def version() -> str | None:
    """Of the package; None where it is not installed."""
    try:
        return metadata.version("dlrover")
    except metadata.PackageNotFoundError:
        return None


class FlashCheckpoint(Way):
    """``save_to_memory`` at every step."""

    def before_training(self) -> None:
        """Start the agent, as ``dlrover-run`` would have, and connect to it."""
        rank = self.place.rank
        self._job = f"{self.place.disk.parent.name}-{self.place.disk.name}"
        os.environ |= {
            "TORCHELASTIC_RUN_ID": self._job,
            "ROLE_NAME": "dlrover-trainer",
            "LOCAL_RANK": str(rank),
            "RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(RANKS),
            "WORLD_SIZE": str(RANKS),
            "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "1",
            "DLROVER_LOG_LEVEL": "ERROR",
        }
        self._agent: subprocess.Popen[bytes] | None = None
        if rank == 0:
            command = [sys.executable, "-W", "ignore", "-c", _AGENT]
            self._agent = subprocess.Popen(command, stdin=subprocess.PIPE)
        dist.barrier()
        storage = importlib.import_module("dlrover.python.common.storage")
        self._engine = importlib.import_module(_ENGINE).FullCheckpointEngine(
            str(self.place.disk),
            storage.PosixDiskStorage(),
            local_shard_num=RANKS,
            global_shard_num=RANKS,
        )
        self._skipped = 0

    def after_step(self, step: int) -> None:
        """Copy into shared memory."""
        state = {"state": dict(self.training.local_tensors)}
        paths = {"state": str(self.place.disk / f"{step}-{self.place.rank}.pt")}
        self._skipped += not self._engine.save_to_memory(step, state, paths)

    def close(self) -> None:
        """End the agent; free what it held."""
        self._engine._shm_handler.unlink()
        self._engine.close()
        dist.barrier()
        if self._agent is not None:
            self._agent.kill()
            self._agent.communicate()
            shutil.rmtree(f"{_SOCKETS}/{self._job}", ignore_errors=True)

    def helpers(self) -> Sequence[int]:
        """The agent."""
        return () if self._agent is None else (self._agent.pid,)

    def skipped(self) -> int:
        """Snapshots that it said it did not take."""
        return self._skipped
