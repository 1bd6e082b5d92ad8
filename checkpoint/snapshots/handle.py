"""What a save gives back at once: which state the step is in, as futures (no torch)."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from everstep.checkpoint.errors import CheckpointError, NotRequested, SnapshotSkipped


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """A checkpoint that was saved or loaded."""

    step: int
    generation: int
    path: str
    size_bytes: int
    duration_s: float
    rng_restored: bool = True
    """False after a load on another mesh (generators were derived from (seed, step, rank)), and
    after one that left them out."""
    why: str = ""
    """Of a load: why it was this step, and from where."""


@dataclass(frozen=True, kw_only=True)
class SaveHandle:
    """One step on its way; the same on every rank.

    A future that stands for something that was not asked for, or that does not come since the step
    was skipped, is failed already (NotRequested, SnapshotSkipped): waiting for it never hangs.
    """

    step: int
    skipped: str | None = None
    """Why the step was not captured; None where it was, or is being captured."""
    captured: "Future[None]" = field(default_factory=Future)
    """The live tensors may change."""
    protected: "Future[None]" = field(default_factory=Future)
    """The step survives the loss of as many nodes as was configured."""
    durable: "Future[StepInfo]" = field(default_factory=Future)
    """The checkpoint is committed in the directory."""


def skipped_handle(step: int, why: str) -> SaveHandle:
    """The handle of a step that is not captured."""
    handle = SaveHandle(step=step, skipped=why)
    for future in (handle.captured, handle.protected, handle.durable):
        refuse(future, SnapshotSkipped(step, why))
    return handle


def durable_handle(info: StepInfo) -> SaveHandle:
    """The handle of a step that is durable already."""
    handle = SaveHandle(step=info.step)
    handle.captured.set_result(None)
    handle.durable.set_result(info)
    refuse(handle.protected, no_redundancy())
    return handle


def no_redundancy() -> NotRequested:
    """Why a step does not become protected."""
    return NotRequested(
        "snapshots are kept on their own node only: there is no redundancy to wait for; wait for "
        "handle.durable"
    )


def refuse(future: "Future[Any]", error: CheckpointError) -> None:
    """Fail a future unless it is done."""
    if not future.done():
        future.set_exception(error)
