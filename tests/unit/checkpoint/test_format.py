"""FORMAT.md is enough to read a checkpoint: another reader finds what was saved."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.torch_state import State
from tests.support.checkpoints import Counter, ThreadCollective, run_threads
from tests.support.format_reader import read_checkpoint, read_record


def _model() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    model.register_buffer("brief", torch.arange(6.0).bfloat16())
    model.register_buffer("flag", torch.tensor(True))
    model.register_buffer("empty", torch.zeros(0, 3))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) + 100 * number)
    return model


def _save(c: ThreadCollective, root: Path) -> None:
    state = State(model=_model(), data=Counter((1, float("inf"))))
    with Checkpointer(root, collective=c) as checkpointer:
        checkpointer.save(7, state)


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_page_is_enough_to_read_a_checkpoint(tmp_path: Path, world_size: int) -> None:
    assert run_threads(lambda c: _save(c, tmp_path), world_size) == [None] * world_size
    objects, tensors = read_checkpoint(tmp_path / "step-00000007-g00001")
    assert objects == {"object.data": {"value": {"$tuple": [1, {"$float": "inf"}]}}}
    for name, tensor in _model().state_dict().items():
        bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
        np.testing.assert_array_equal(tensors[f"model.{name}"], bits.numpy())
    generators = {name.rpartition(".")[0] for name in tensors if name.startswith("rng.")}
    assert generators == {f"rng.rank{rank}" for rank in range(world_size)}
    generation = read_record(tmp_path / "generations" / "00001.json")
    assert (generation["number"], generation["parent"], generation["fork_step"]) == (1, None, None)
