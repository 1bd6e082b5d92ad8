"""torch.distributed.checkpoint in the snapshot benchmark, as its documentation says.

Every save writes a new folder. Before the next one the last has to be written: DCP copies into
memory that the writing still reads, and saves that overtake each other would pile up. State dicts
are made once: their tensors stay the same, and training changes them in place.
"""

from concurrent.futures import Future
from typing import Any

import torch.distributed.checkpoint as dcp
from snapshot_inflation_way import Way
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import (
    AsyncCheckpointerType,
    AsyncSaveResponse,
)


def background_stager() -> DefaultStager:
    """DCP's best on CPUs: no pinned or shared memory; copies on a thread of its own."""
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=False,
            use_async_staging=True,
            use_non_blocking_copy=False,
        )
    )


class DcpBest(Way):
    """``async_save`` that copies and writes in threads; the update waits for the copy alone."""

    def before_training(self) -> None:
        """One stager for all saves: it keeps its memory."""
        self._stager = background_stager()
        self._saved: AsyncSaveResponse | None = None

    def after_step(self, step: int) -> None:
        """Begin to copy and write."""
        self.drain()
        saved = dcp.async_save(
            self.training.state_dict,
            checkpoint_id=self.place.disk / str(step),
            planner=DefaultSavePlanner(enable_plan_caching=True),
            process_group=self.place.group,
            async_checkpointer_type=AsyncCheckpointerType.THREAD,
            async_stager=self._stager,
        )
        assert isinstance(saved, AsyncSaveResponse)
        self._saved = saved

    def fence(self) -> None:
        """Until the copy is done."""
        if self._saved is not None:
            self._saved.staging_completion.result()

    def drain(self) -> None:
        """Until the files are written."""
        if self._saved is not None:
            self._saved.upload_completion.result()

    def close(self) -> None:
        """Free the copy."""
        self.drain()
        self._saved = None
        self._stager.close()


class DcpStaging(Way):
    """Only the copy of ``DcpBest``: nothing is written."""

    def before_training(self) -> None:
        """One stager for all copies."""
        self._stager = background_stager()
        self._staged: Future[Any] | None = None

    def after_step(self, step: int) -> None:
        """Begin to copy."""
        staged = self._stager.stage(self.training.state_dict)
        assert isinstance(staged, Future)
        self._staged = staged

    def fence(self) -> None:
        """Until the copy is done."""
        if self._staged is not None:
            self._staged.result()

    def close(self) -> None:
        """Free the copy."""
        self._staged = None
        self._stager.close()


class DcpDefault(Way):
    """``async_save`` as it comes; only the process group is one of its own."""

    def before_training(self) -> None:
        """Nothing is under way."""
        self._saved: Future[Any] | None = None

    def after_step(self, step: int) -> None:
        """Copy, and begin to write."""
        self.drain()
        saved = dcp.async_save(
            self.training.state_dict,
            checkpoint_id=self.place.disk / str(step),
            process_group=self.place.group,
        )
        assert isinstance(saved, Future)
        self._saved = saved

    def drain(self) -> None:
        """Until the files are written."""
        if self._saved is not None:
            self._saved.result()

    def close(self) -> None:
        """Let the files be finished."""
        self.drain()


class DcpSync(Way):
    """``save``: training goes on when the files are written."""

    def after_step(self, step: int) -> None:
        """Write."""
        dcp.save(
            self.training.state_dict,
            checkpoint_id=self.place.disk / str(step),
            process_group=self.place.group,
        )
