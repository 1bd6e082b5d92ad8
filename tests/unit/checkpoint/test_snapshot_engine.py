"""Snapshots of every step: what is captured, when it may be changed, when it is durable."""

from pathlib import Path

import pytest
import torch

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.errors import NotRequested
from tests.support.checkpoints import Counter, bits, fresh_state, tiny_state, train_step


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
