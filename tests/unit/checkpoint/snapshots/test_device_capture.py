"""Snapshots of states on devices; here a device that lives in host memory and is always late."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.snapshots import device_capture, engine
from everstep.checkpoint.snapshots.device_capture import Copies, CudaCalls, DeviceCapture
from everstep.checkpoint.snapshots.fences import Fences
from everstep.checkpoint.torch_state import State
from tests.support.adversary import FLAVOURS
from tests.support.adversary_runs import torn
from tests.support.checkpoints import Counter, tiny_state, train_step
from tests.support.snapshot_checks import SealedCopies, differences, moment


class _Pending:
    def __init__(self, copies: Copies) -> None:
        self._copies, self._lock = copies, threading.Lock()
        self.passed = False

    def run(self) -> None:
        with self._lock:
            for target, source in self._copies:
                assert target.is_contiguous()
                target.copy_(source)
            self._copies, self.passed = (), True


class LateDevice:
    """Copies as late as it may: when something is to come after them."""

    refusal: str | None = None
    pinned: list[int]
    """Addresses; of all instances."""

    def owns(self, tensor: torch.Tensor) -> bool:
        return tensor.numel() > 1

    def pin(self, memory: ByteArray) -> str | None:
        if self.refusal is None:
            self.pinned.append(memory.ctypes.data)
        return self.refusal

    def unpin(self, memory: ByteArray) -> None:
        self.pinned.remove(memory.ctypes.data)

    def copy(self, copies: Copies) -> dict[str, _Pending]:
        return {"late": _Pending(copies)}

    def hold(self, marks: Mapping[Any, Any]) -> None:
        for pending in marks.values():
            pending.run()

    def passed(self, marks: Mapping[Any, Any]) -> bool:
        return all(pending.passed for pending in marks.values())


@pytest.fixture
def late_device(monkeypatch: pytest.MonkeyPatch) -> type[LateDevice]:
    """States are on such a device."""

    class Device(LateDevice):
        pinned: list[int] = []  # noqa: RUF012

    monkeypatch.setattr(device_capture, "CudaCalls", Device)
    return Device


@pytest.mark.parametrize("name", ["adamw_fused", "muon_and_adamw", "own", "in_backward"])
def test_snapshots_are_whole(name: str, tmp_path: Path, late_device: type[LateDevice]) -> None:
    taken, wrong = torn(tmp_path, FLAVOURS[name], steps=6)
    assert not wrong
    assert taken == 6
    assert not late_device.pinned


def test_without_the_fence_they_are_torn(
    tmp_path: Path, late_device: type[LateDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "Fences", lambda _: Fences(lambda: None))
    _, wrong = torn(tmp_path, FLAVOURS["adamw_fused"], steps=4)
    assert any("optimizer." in name for name in wrong)


def test_the_host_goes_on_past_the_fence_and_waits_at_the_next_save(
    tmp_path: Path, late_device: type[LateDevice]
) -> None:
    late_device.hold = lambda self, marks: None  # type: ignore[method-assign]
    state, memory = tiny_state(), SealedCopies()
    with Checkpointer(tmp_path, memory=memory) as checkpointer:
        checkpointer.load(state)
        wanted = moment(state)
        first = checkpointer.save(0, state)
        checkpointer.wait_captured()
        capture = checkpointer._engine._current.capture  # type: ignore[union-attr]
        assert isinstance(capture, DeviceCapture)
        assert capture.copied_bytes == 0
        assert not first.captured.done()
        later = threading.Timer(0.2, capture._marks["late"].run)
        later.start()
        second = checkpointer.save(1, state)
        assert first.captured.done()
        assert second.skipped is None
        assert not differences(wanted, memory.take(0))
        last = checkpointer._engine._current.capture  # type: ignore[union-attr]
        assert isinstance(last, DeviceCapture)
        last._marks["late"].run()
        later.join()


def test_slots_are_registered_once_and_again_for_a_new_plan(
    tmp_path: Path, late_device: type[LateDevice]
) -> None:
    state = tiny_state(data=Counter())
    with Checkpointer(tmp_path, memory=SealedCopies()) as checkpointer:
        checkpointer.load(state)
        for step in range(6):
            train_step(state)
            checkpointer.save(step, state)
        checkpointer.wait_captured()
        before = list(late_device.pinned)
        assert len(before) == len(set(before)) == 2
        state.model.register_buffer("more", torch.zeros(10_000))
        for step in range(6, 14):
            checkpointer.save(step, state)
            checkpointer.wait_captured()
        assert len(late_device.pinned) == 2
        assert not set(before) & set(late_device.pinned)
    assert not late_device.pinned


def test_memory_that_cannot_be_registered_is_told_once(
    tmp_path: Path, late_device: type[LateDevice]
) -> None:
    late_device.refusal = "out of memory"
    state, memory = tiny_state(), SealedCopies()
    with Checkpointer(tmp_path, memory=memory) as checkpointer:
        checkpointer.load(state)
        with pytest.warns(RuntimeWarning, match=r"registered with the GPU \(out of memory\)"):
            checkpointer.save(0, state)
        checkpointer.wait_captured()
        for step in range(1, 4):
            train_step(state)
            wanted = moment(state)
            if checkpointer.save(step, state).skipped is None:
                checkpointer.wait_captured()
                assert not differences(wanted, memory.take(step))
    assert not late_device.pinned


def test_a_run_that_fails_waits_for_its_devices(
    tmp_path: Path, late_device: type[LateDevice]
) -> None:
    state = tiny_state()
    checkpointer = Checkpointer(tmp_path, memory=SealedCopies())
    checkpointer.load(state)
    handle = checkpointer.save(0, state)
    checkpointer.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert handle.captured.done()
    assert not late_device.pinned


def test_states_in_host_memory_need_no_device() -> None:
    assert not CudaCalls().owns(torch.zeros(3))
    assert State(model=torch.nn.Linear(1, 1)).optimizers == ()
