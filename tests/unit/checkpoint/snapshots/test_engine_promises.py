"""What holds when loops break the rules, storage is slow, memory fails or threads race."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.copier import Copier, CopyJob
from everstep.checkpoint.errors import CheckpointError, SnapshotSkipped, StateError
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.snapshots import engine
from everstep.checkpoint.snapshots.memory import Flushed, FlushOrder
from everstep.checkpoint.torch_state import State
from tests.support.checkpoints import (
    Counter,
    ThreadCollective,
    bits,
    fresh_state,
    run_threads,
    tiny_state,
    train_step,
)
from tests.support.snapshot_checks import SealedCopies, copy_at, differences, moment


class Gated(SealedCopies):
    """Memory whose flushes begin when a gate is open, and whose seals may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.failing: dict[int, Exception] = {}
        self._waiting = ThreadPoolExecutor(4)

    def sealed(self, index: int, all_sealed: StepId | None) -> None:
        super().sealed(index, all_sealed)
        error = self.failing.pop(max(self.found), None)
        if error is not None:
            raise error

    def flush(self, index: int, order: FlushOrder) -> "Future[Flushed]":
        inner = super().flush

        def later() -> Flushed:
            assert self.gate.wait(20)
            return inner(index, order).result(20)

        return self._waiting.submit(later)

    def close(self, *, finished: bool = True) -> None:
        self._waiting.shutdown()
        super().close(finished=finished)


def _step(checkpointer: Checkpointer, memory: SealedCopies, state: State, step: int) -> Any:
    """Train, save, and wait until what was captured is sealed."""
    train_step(state)
    handle = checkpointer.save(step, state)
    checkpointer.wait_captured()
    if handle.skipped is None:
        memory.take(step)
    return handle


@pytest.mark.parametrize("late", [True, False])
def test_a_change_that_no_hook_announced_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Whether it came before the copy or after it."""
    copy_at(monkeypatch, 0.0 if late else None)
    state = tiny_state()
    with Checkpointer(tmp_path, memory=SealedCopies()) as checkpointer:
        checkpointer.load(state)
        for step in range(3):
            train_step(state)
            handle = checkpointer.save(step, state)
        if not late:
            handle.captured.result(20)
        state.model[0].weight.data.add_(1)  # type: ignore[index,operator]
        with pytest.raises(StateError, match=r"step 2 .* AdamW has not called .*wait_captured"):
            checkpointer.save(3, state)


def test_a_change_after_wait_captured_is_in_order(tmp_path: Path) -> None:
    state, memory = tiny_state(), SealedCopies()
    with Checkpointer(tmp_path, memory=memory) as checkpointer:
        checkpointer.load(state)
        for step in range(5):
            train_step(state)
            wanted = moment(state)
            checkpointer.save(step, state)
            checkpointer.wait_captured()
            state.model[0].weight.data.add_(1)  # type: ignore[index,operator]
            assert not differences(wanted, memory.take(step))


def test_saves_that_wait_say_so_once(tmp_path: Path) -> None:
    state = State(model=nn.Linear(3, 3))
    with Checkpointer(tmp_path, memory=SealedCopies()) as checkpointer:
        checkpointer.load(state)
        checkpointer.save(0, state)
        checkpointer.save(1, state)
        with pytest.warns(RuntimeWarning, match="copied while training waits") as told:
            checkpointer.save(2, state)
        assert told[0].filename == __file__
        checkpointer.save(3, state)
        checkpointer.wait_captured()
        checkpointer.save(4, state)
        assert checkpointer.report().waiting == 4


def test_a_slow_flush_keeps_a_slot_and_training_goes_on(tmp_path: Path) -> None:
    state, memory = tiny_state(data=Counter()), Gated()
    with Checkpointer(tmp_path, memory=memory, durable_every=1, timeout_s=0.5) as checkpointer:
        checkpointer.load(state)
        handles = [_step(checkpointer, memory, state, step) for step in range(1, 7)]
        assert all(handle.skipped is None for handle in handles)
        second = checkpointer.save(7, state, durable=True)  # another slot is pinned
        checkpointer.wait_captured()
        memory.take(7)
        skipped = [_step(checkpointer, memory, state, step) for step in range(8, 11)]
        assert [handle.skipped is None for handle in skipped] == [True, False, False]
        with pytest.raises(SnapshotSkipped, match="slot"):
            skipped[-1].durable.result(0)
        assert checkpointer.report().skipped == 2
        with pytest.raises(CheckpointError, match="no slot became free"):
            checkpointer.save(11, state, durable=True)
        memory.gate.set()
        last = checkpointer.save(12, state, durable=True)
        assert {h.durable.result(20).step for h in (handles[0], second, last)} == {1, 7, 12}


@pytest.mark.parametrize("error", [OSError("no more pages"), CheckpointError("gone")])
def test_a_failed_seal_costs_its_step_only(tmp_path: Path, error: Exception) -> None:
    state, memory = tiny_state(data=Counter()), Gated()
    memory.gate.set()
    memory.failing[2] = error
    with Checkpointer(tmp_path, memory=memory) as checkpointer:
        checkpointer.load(state)
        _step(checkpointer, memory, state, 1)
        failed = _step(checkpointer, memory, state, 2)
        assert failed.durable.exception(20) is not None
        assert _step(checkpointer, memory, state, 3).skipped == "a rank failed to capture step 2"
        assert _step(checkpointer, memory, state, 4).skipped is None
        assert checkpointer.report().failed == 1
        assert checkpointer.save(5, state, durable=True).durable.result(20).step == 5


def test_a_save_that_must_not_be_skipped_is_not_by_a_failed_seal(tmp_path: Path) -> None:
    state, memory = tiny_state(data=Counter()), Gated()
    memory.gate.set()
    memory.failing[1] = OSError("no more pages")
    with Checkpointer(tmp_path, memory=memory) as checkpointer:
        checkpointer.load(state)
        _step(checkpointer, memory, state, 1)
        assert checkpointer.save(2, state, durable=True).durable.result(20).step == 2


def test_a_defect_of_the_memory_is_raised_by_the_next_save(tmp_path: Path) -> None:
    state, memory = tiny_state(), Gated()
    memory.failing[0] = ZeroDivisionError("a defect")
    checkpointer = Checkpointer(tmp_path, memory=memory)
    checkpointer.load(state)
    handle = checkpointer.save(0, state)
    assert handle.durable.exception(20) is not None
    checkpointer._engine._current.over.wait(20)  # type: ignore[union-attr]
    with pytest.raises(ZeroDivisionError):
        checkpointer.save(1, state)
    with pytest.raises(ZeroDivisionError):
        checkpointer.close()


def _swap(state: State) -> None:
    held = state.optimizers[0].param_groups[0]["params"]
    held[0], held[1] = held[1], held[0]


@pytest.mark.parametrize("change", ["plan", "load"])
def test_a_slot_that_is_flushed_outlives_a_new_plan(tmp_path: Path, change: str) -> None:
    """The new plan has slots of the same size, so that memory gives the same ones."""
    state, memory = tiny_state(data=Counter()), Gated()
    with Checkpointer(tmp_path, memory=memory, durable_every=100) as checkpointer:
        checkpointer.load(state)
        train_step(state)
        memory.gate.set()
        checkpointer.save(1, state, durable=True).durable.result(20)
        memory.gate.clear()
        train_step(state)
        wanted = bits(state)
        flushed = checkpointer.save(2, state, durable=True)
        checkpointer.wait_captured()
        memory.take(2)
        if change == "plan":
            _swap(state)
        else:
            checkpointer.load(state)
        taken = [_step(checkpointer, memory, state, step).skipped for step in range(3, 12)]
        assert taken.count(None) >= 6
        memory.gate.set()
        assert flushed.durable.result(20).step == 2
    if change == "plan":
        loaded = fresh_state(data=Counter())
        _swap(loaded)
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.load(loaded, 2)
        assert {k: v for k, v in bits(loaded).items() if k.startswith("model.")} == {
            k: v for k, v in wanted.items() if k.startswith("model.")
        }


def test_threads_that_step_at_once_all_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, seen = threading.Event(), []

    class SlowJob(CopyJob):
        def help(self) -> float:
            begun.set()
            time.sleep(0.1)
            return super().help()

    class Paused(Copier):
        def start(self, *args: Any, **kwargs: Any) -> CopyJob:
            job = super().start(*args, **{**kwargs, "bytes_per_s": 0.0})
            return SlowJob(job._native, self)

    monkeypatch.setattr(engine, "Copier", Paused)
    state = tiny_state()
    with Checkpointer(tmp_path, memory=SealedCopies()) as checkpointer:
        checkpointer.load(state)
        checkpointer.wait_captured()
        handle = checkpointer.save(0, state)

        def fence() -> None:
            checkpointer.wait_captured()
            seen.append(checkpointer._engine._current.capture.done)  # type: ignore[union-attr]

        first, second = threading.Thread(target=fence), threading.Thread(target=fence)
        first.start()
        assert begun.wait(10)
        second.start()
        first.join()
        second.join()
        handle.captured.result(20)
    assert seen == [True, True]


def _one_rank_steps(c: ThreadCollective, folder: Path, pause_s: Callable[[int], float]) -> Any:
    """Rank 0 trains; the optimizers of the others never step."""
    torch.manual_seed(c.rank)
    model = nn.ModuleDict({f"part{c.rank}": nn.Linear(8, 8)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = State(model=model, optimizer=optimizer)
    skipped = []
    with Checkpointer(folder, collective=c, durable_every=4, keep=9) as checkpointer:
        checkpointer.load(state)
        for step in range(1, 13):
            if c.rank == 0:
                model["part0"](torch.randn(4, 8)).sum().backward()
                optimizer.step()
            time.sleep(pause_s(step))
            handle = checkpointer.save(step, state, durable=True if step % 5 == 0 else None)
            skipped.append(handle.skipped is not None)
            if step == 5:
                assert handle.durable.result(20).step == 5
            if step == 6:
                checkpointer.load(state, 5)
                break
        for step in range(6, 13):
            if c.rank == 0:
                optimizer.step()
            time.sleep(pause_s(step))
            handle = checkpointer.save(step, state, durable=True if step == 12 else None)
            skipped.append(handle.skipped is not None)
    return skipped


@pytest.mark.filterwarnings("ignore:snapshots are copied while training waits")
def test_ranks_may_be_skewed_and_step_unlike_each_other(tmp_path: Path) -> None:
    results = run_threads(
        lambda c: _one_rank_steps(c, tmp_path, lambda step: 0.01 * ((step + c.rank) % 3)), 3
    )
    assert results[0] == results[1] == results[2]
    assert isinstance(results[0], list)
    assert results[0].count(False) >= 6
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        assert checkpointer.steps()[-1] == 12
