"""Snapshots of a state on a GPU; `pytest -m gpu` on a CUDA host."""

from pathlib import Path

import numpy as np
import pytest
import torch

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.snapshots import engine
from everstep.checkpoint.snapshots.device_capture import CudaCalls
from everstep.checkpoint.snapshots.fences import Fences
from tests.support.adversary import FLAVOURS, training
from tests.support.adversary_runs import torn
from tests.support.snapshot_checks import SealedCopies

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

NAMES = ["sgd", "adamw_loop", "adamw_foreach", "adamw_fused", "muon_and_adamw", "own"]


@pytest.mark.parametrize("name", [*NAMES, "in_backward"])
@pytest.mark.parametrize("width", [8, 2048])
def test_snapshots_are_whole(name: str, width: int, tmp_path: Path) -> None:
    taken, wrong = torn(tmp_path, FLAVOURS[name], 20, width, "cuda")
    assert not wrong
    assert taken >= 15


def test_without_the_fence_they_are_torn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "Fences", lambda _: Fences(lambda: None))
    _, wrong = torn(tmp_path, FLAVOURS["adamw_fused"], 8, 4096, "cuda")
    assert wrong


def test_the_host_does_not_wait_for_the_copies(tmp_path: Path) -> None:
    loop = training(FLAVOURS["adamw_fused"], 4096, "cuda")
    memory = SealedCopies()
    with Checkpointer(tmp_path, memory=memory) as checkpointer:
        checkpointer.load(loop.state)
        for step in range(3):
            loop.train()
            checkpointer.save(step, loop.state)
            checkpointer.wait_captured()
            memory.take(step)
        torch.cuda._sleep(2_000_000_000)  # about a second of the computing stream
        handle = checkpointer.save(3, loop.state)
        checkpointer.wait_captured()
        assert not handle.captured.done()
        handle.captured.result(60)


def test_memory_is_registered_and_given_back() -> None:
    calls, memory = CudaCalls(), np.zeros(2**20, np.uint8)
    assert calls.pin(memory) is None
    assert calls.pin(memory) is not None  # it is already
    torch.ones(3, device="cuda").sum().item()  # a refusal leaves no error behind
    calls.unpin(memory)
    assert calls.pin(memory) is None
    calls.unpin(memory)
