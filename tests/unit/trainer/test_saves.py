"""When the state of a run is saved, and what is told of it."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from everstep.checkpoint.errors import NotRequested, SaveFailedError
from everstep.checkpoint.snapshots.handle import SaveHandle, StepInfo
from everstep.checkpoint.snapshots.report import SnapshotReport
from everstep.trainer.config import CheckpointConfig
from everstep.trainer.progress import report_line
from everstep.trainer.saves import MemoryUse, Saves

USE = MemoryUse(where="on this node", used_bytes=3 * 2**20, predicted_bytes=4 * 2**20)


class FakeCheckpointer:
    """Remembers what it was asked for; tests resolve the futures."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, bool | None]] = []
        self.durable: list[Future[StepInfo]] = []
        self.at_once = False

    def save(
        self,
        step: int,
        state: object,
        *,
        durable: bool | None = None,
        on_bytes: Callable[[int], None] | None = None,
    ) -> SaveHandle:
        self.asked.append((step, durable))
        handle = SaveHandle(step=step)
        self.durable.append(handle.durable)
        if self.at_once or durable:
            handle.durable.set_result(info(step))
        return handle

    def report(self) -> SnapshotReport:
        return SnapshotReport(
            taken=9,
            skipped=1,
            last_skip="no slot was free",
            save_s=0.1,
            stall_s=0.2,
            newest_sealed=10,
        )


def info(step: int) -> StepInfo:
    return StepInfo(step=step, generation=1, path=f"c/{step}", size_bytes=1, duration_s=1.0)


class Bench:
    """Saves with a fake checkpointer, and what they said."""

    def __init__(self, **config: Any) -> None:
        self.said: list[dict[str, Any]] = []
        self.checkpointer = FakeCheckpointer()
        self.saves = Saves(
            self.checkpointer,  # type: ignore[arg-type]
            CheckpointConfig(**config),
            lambda kind, **facts: self.said.append({"kind": kind, **facts}),
            0,
            lambda: USE,
            5.0,
        )

    def step(self, step: int, *, final: bool = False) -> None:
        self.saves.after_step(step, lambda: None, final=final)  # type: ignore[arg-type, return-value]


def test_without_snapshots_only_what_is_due_is_saved() -> None:
    bench = Bench(memory=None, every_steps=3)
    bench.checkpointer.at_once = True
    for step in range(1, 8):
        bench.step(step, final=step == 7)
    assert [step for step, _ in bench.checkpointer.asked] == [3, 6, 7]
    assert [said["step"] for said in bench.said] == [3, 6, 7]
    assert bench.saves.durable_step == 7
    bench.saves.tell(7, 1.0)
    assert len(bench.said) == 3


def test_snapshots_are_taken_after_every_step_and_the_last_one_is_durable() -> None:
    bench = Bench(every_steps=3)
    for step in (1, 2, 3):
        bench.step(step, final=step == 3)
    assert bench.checkpointer.asked == [(1, None), (2, None), (3, True)]
    assert bench.saves.durable_step == 3


def test_what_becomes_durable_is_told_at_the_next_step() -> None:
    bench = Bench()
    bench.step(1)
    bench.step(2)
    assert bench.said == []
    bench.checkpointer.durable[0].set_exception(NotRequested("not its turn"))
    bench.checkpointer.durable[1].set_result(info(2))
    bench.step(3)
    assert [(said["kind"], said["step"]) for said in bench.said] == [("saved", 2)]


def test_an_outage_of_storage_is_told_once_and_ends_nothing() -> None:
    bench = Bench()
    for step in range(1, 6):
        bench.step(step)
    for future in bench.checkpointer.durable[:3]:
        future.set_exception(SaveFailedError(1, {0: "the disk is full"}))
    bench.step(6)
    assert [said["kind"] for said in bench.said] == ["not_saved"]
    line = report_line(bench.said[0])
    assert line is not None
    assert "training goes on" in line
    bench.checkpointer.durable[3].set_result(info(4))
    bench.checkpointer.durable[4].set_exception(SaveFailedError(5, {0: "the disk is full"}))
    bench.step(7)
    assert [said["kind"] for said in bench.said] == ["not_saved", "saved", "not_saved"]


def test_settled_it_knows_what_is_durable() -> None:
    bench = Bench()
    bench.step(1)
    bench.step(2)
    bench.checkpointer.durable[0].set_exception(NotRequested("not its turn"))
    later = threading.Timer(0.1, lambda: bench.checkpointer.durable[1].set_result(info(2)))
    later.start()
    assert bench.saves.settle() == 2
    later.join()


def test_a_last_step_that_cannot_be_made_durable_is_an_error() -> None:
    bench = Bench()
    bench.checkpointer.save = failing  # type: ignore[method-assign, assignment]
    with pytest.raises(SaveFailedError):
        bench.step(1, final=True)


def failing(step: int, state: object, **_: object) -> SaveHandle:
    handle = SaveHandle(step=step)
    handle.durable.set_exception(SaveFailedError(step, {0: "the disk is full"}))
    return handle


def test_how_snapshots_went_is_told_in_one_line() -> None:
    bench = Bench()
    bench.step(10, final=True)
    bench.saves.tell(10, 3.2)
    assert report_line(bench.said[-1]) == (
        "snapshots: 9 taken, 1 skipped (last: no slot was free) · 30 ms of each step (10.0 %) · "
        "3.0 MiB of host memory on this node (4.0 MiB predicted) · step 10 sealed · step 10 durable"
    )
