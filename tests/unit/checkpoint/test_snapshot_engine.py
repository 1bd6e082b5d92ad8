"""Snapshots of every step: what is captured, when it may be changed, when it is durable."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.errors import NotRequested
from everstep.checkpoint.snapshots.handle import SaveHandle
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
from tests.support.cli import wait_until


def _loaded(root: Path, step: int | None = None) -> dict[str, bytes]:
    state = fresh_state(data=Counter())
    with Checkpointer(root) as checkpointer:
        checkpointer.load(state, step)
    return bits(state)


def test_every_step_is_captured_and_the_interval_is_durable(tmp_path: Path) -> None:
    state = tiny_state(data=Counter(3))
    wanted = {}
    with Checkpointer(tmp_path, durable_every=3, keep=9) as checkpointer:
        assert checkpointer.load(state) == 0
        for step in range(1, 11):
            train_step(state)
            wanted[step] = bits(state)
            handle = checkpointer.save(step, state)
            assert handle.skipped is None
            if step % 3 == 0:
                handle.durable.result(20)
            else:
                with pytest.raises(NotRequested, match="in memory only"):
                    handle.durable.result(20)
        report = checkpointer.report()
    assert report.taken == 10
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [3, 6, 9]
    for step in (3, 6, 9):
        assert _loaded(tmp_path, step) == wanted[step]


def _run_ranks(tmp_path: Path, world_size: int, steps: int, **options: Any) -> list[Any]:
    """Every rank trains a model of its own (as pipeline stages do), and saves every step."""

    def run(c: ThreadCollective) -> Any:
        torch.manual_seed(c.rank)
        model = nn.ModuleDict({f"stage{c.rank}": nn.Linear(64, 64)})
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        state = State(model=model, optimizer=optimizer, data=Counter(0))
        wanted = {}
        with Checkpointer(tmp_path, collective=c, keep=99, **options) as checkpointer:
            checkpointer.load(state)
            for step in range(1, steps + 1):
                model[f"stage{c.rank}"](torch.randn(4, 64)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                state.objects["data"].value = step
                forced = True if step in (6, steps) else None
                handle = checkpointer.save(step, state, durable=forced)
                assert handle.skipped is None or not forced
                if handle.skipped is None:
                    wanted[step] = bits(state), handle
            report = checkpointer.report()
        return wanted, report

    return run_threads(run, world_size)


def test_ranks_capture_the_same_steps(tmp_path: Path) -> None:
    results = _run_ranks(tmp_path, 3, 12, durable_every=2)
    captured = [sorted(wanted) for wanted, _ in results]
    assert captured[0] == captured[1] == captured[2]
    assert len(captured[0]) >= 6
    durable = [
        step for step, (_, handle) in results[0][0].items() if handle.durable.exception() is None
    ]
    assert {6, 12} <= set(durable)
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        assert checkpointer.steps() == durable
    for step in durable:
        for rank in range(3):
            model = nn.ModuleDict({f"stage{rank}": nn.Linear(64, 64)})
            state = State(model=model)
            with Checkpointer(tmp_path, read_only=True) as checkpointer:
                directory = checkpointer.inspect(step)
                assert directory is not None
                assert directory.objects["object.data"] == {"value": step}
            found = _read_model(tmp_path, step, state)
            wanted = {k: v for k, v in results[rank][0][step][0].items() if k.startswith("model.")}
            assert found == wanted


def _read_model(root: Path, step: int, state: State) -> dict[str, bytes]:
    """The tensors of the state's model, out of a checkpoint that has more."""
    directory = CheckpointDirectory(root)
    step_id = directory.find(step)
    assert step_id is not None
    with directory.reader(step_id) as reader:
        return {
            f"model.{name}": reader.read(f"model.{name}").tobytes()
            for name in state.model.state_dict()
        }


class Diary:
    """An object whose plain state grows."""

    def __init__(self) -> None:
        self.text = ""

    def state_dict(self) -> dict[str, Any]:
        return {"text": self.text}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.text = state_dict["text"]


def _is_over(checkpointer: Checkpointer, handle: SaveHandle) -> bool:
    """Whether a snapshot was skipped, has failed, or is sealed."""
    report = checkpointer.report()
    return handle.skipped is not None or report.failed > 0 or report.newest_sealed == handle.step


def test_objects_may_outgrow_their_slots(tmp_path: Path) -> None:
    diary = Diary()
    state = tiny_state(diary=diary)
    with Checkpointer(tmp_path, durable_every=100) as checkpointer:
        checkpointer.load(state)
        for step in range(1, 9):
            train_step(state)
            if step == 3:
                diary.text = "x" * 300_000
            handle = checkpointer.save(step, state)
            assert wait_until(partial(_is_over, checkpointer, handle))
        checkpointer.save(9, state, durable=True).durable.result(30)
        report = checkpointer.report()
    assert report.failed == 1
    assert report.skipped == 1
    found = Diary()
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.load(fresh_state(diary=found)) == 10
    assert found.text == diary.text
