"""A disk that is really full: the save fails on all ranks with a reason, everything else stays."""

from pathlib import Path

import pytest
import torch
from torch import nn

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.errors import SaveFailedError
from everstep.checkpoint.torch_state import State
from tests.support.checkpoints import ThreadCollective, bits, run_threads

pytestmark = pytest.mark.chaos


def _save_until_full(c: ThreadCollective, root: Path) -> tuple[str, dict[int, str], list[int]]:
    state = State(model=nn.ParameterList([torch.full((64, 1024), 7.0) for _ in range(5)]))
    with Checkpointer(root, collective=c, keep=9) as checkpointer:
        checkpointer.save(1, state)
        wanted = bits(state)
        checkpointer.save(2, state)
        with pytest.raises(SaveFailedError) as caught:
            checkpointer.save(3, state)
        c.exchange("failed", b"")
        steps = checkpointer.steps()
        c.exchange("seen", b"")
        checkpointer.load(state, 2)
        assert bits(state) == wanted
    return str(caught.value), caught.value.causes, steps


def test_a_full_disk(small_disk: Path) -> None:
    results = run_threads(lambda c: _save_until_full(c, small_disk / "c"), 2)
    text, causes, steps = results[0]
    assert results[1] == results[0]
    assert steps == [1, 2]
    assert causes
    assert all(cause.startswith("No space left on device (/") for cause in causes.values())
    assert "earlier checkpoints are untouched" in text
    assert sorted(p.name for p in (small_disk / "c").glob("step-*")) == [
        "step-00000001-g00001",
        "step-00000002-g00001",
    ]
