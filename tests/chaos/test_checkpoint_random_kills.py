"""A thousand writers killed at random moments, each going on where the one before was."""

import random
import signal
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch import nn

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.torch_state import State
from tests.support.checkpoints import Counter
from tests.support.spawn import PRELOAD

pytestmark = pytest.mark.chaos
TRIALS = 1000
TRIALS_PER_DIRECTORY = 50


def _state(step: int) -> State:
    """Every number of it tells the step."""
    model = nn.ParameterList([torch.full((100, 70), float(step)) for _ in range(5)])
    return State(model=model, data=Counter(step))


def _save_for_ever(root: Path, ready: Connection) -> None:
    torch.set_num_threads(1)
    with Checkpointer(root, keep=2) as checkpointer:
        step = checkpointer.load(_state(0))
        ready.send(step)
        while True:
            checkpointer.save(step, _state(step))
            step += 1


def _check(root: Path) -> int:
    """Every step that can be loaded is whole; the newest one, -1 for none."""
    newest = -1
    for step_id in CheckpointDirectory(root).lineage():
        state = _state(0)
        with Checkpointer(root, read_only=True) as reader:
            reader.load(state, step_id.step)
        assert all(bool((p == step_id.step).all()) for p in state.model.parameters())
        assert state.objects["data"].state_dict() == {"value": step_id.step}
        newest = step_id.step
    return newest


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_thousand_kills(tmp_path: Path) -> None:
    root, context, newest = tmp_path / "0", get_context("forkserver"), -1
    context.set_forkserver_preload(PRELOAD)
    killed_before_a_save = 0
    for trial in range(TRIALS):
        if trial % TRIALS_PER_DIRECTORY == 0:
            root, newest = tmp_path / str(trial), -1
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_save_for_ever, args=(root, theirs), daemon=True)
        process.start()
        theirs.close()
        assert ours.poll(60)
        assert ours.recv() == newest + 1
        time.sleep(random.Random(trial).uniform(0.0, 0.04 if trial % 10 else 1.0))
        process.kill()
        process.join()
        ours.close()
        assert process.exitcode == -signal.SIGKILL
        process.close()
        found = _check(root)
        assert found >= newest
        killed_before_a_save += found == newest
        newest = found
    assert 0 < killed_before_a_save < TRIALS
    left = list((root / "generations").glob("*.tmp"))
    assert len(left) <= 1  # that of the last one killed; each job clears what others left
