"""Snapshots of shards, which optimizers change as soon as they may."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.snapshots import engine
from everstep.checkpoint.snapshots.fences import Fences
from everstep.checkpoint.state_capture import Place
from everstep.checkpoint.torch_collective import ProcessGroupCollective
from everstep.checkpoint.torch_state import State
from tests.support.snapshot_checks import SealedCopies, copy_at, moment
from tests.support.spawn import run_ranks

pytestmark = [pytest.mark.multiproc, pytest.mark.slow, pytest.mark.timeout(300)]

STEPS = 60


def _wrong(rank: int, world_size: int, folder: Path, fenced: bool) -> tuple[int, list[str]]:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (world_size,))
    model: Any = nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.Linear(9, 3))
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    optimizer.register_step_pre_hook(lambda *_: _change(optimizer))
    state = State(model=model, optimizer=optimizer)
    place = Place(rank, {"rank": world_size}, {"rank": rank})
    memory, wrong, taken = SealedCopies(), [], 0
    with pytest.MonkeyPatch.context() as patch:
        copy_at(patch, 0.0)
        if not fenced:
            patch.setattr(engine, "Fences", lambda _: Fences(lambda: None))
        collective = ProcessGroupCollective()
        with Checkpointer(folder, collective=collective, memory=memory) as checkpointer:
            checkpointer.load(state)
            for step in range(STEPS):
                _train(model, optimizer)
                wanted = moment(state, place)
                handle = checkpointer.save(step, state)
                _train(model, optimizer)
                checkpointer.wait_captured()
                if handle.skipped is None:
                    taken += 1
                    found = memory.take(step).tensors
                    wrong += [f.key for f, data in found.items() if wanted.tensors[f] != data]
    return taken, wrong


def _train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(4, 7)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def _change(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.to_local().add_(0.001)
    for values in optimizer.state.values():
        for key, value in values.items():
            if key != "step":
                value.to_local().mul_(1.01)


def test_snapshots_of_shards_are_whole(tmp_path: Path) -> None:
    results = run_ranks(_wrong, 2, tmp_path, True)
    assert results[0][0] == results[1][0] >= STEPS // 2
    assert not results[0][1]
    assert not results[1][1]


def test_without_the_fence_they_are_torn(tmp_path: Path) -> None:
    assert all(wrong for _, wrong in run_ranks(_wrong, 2, tmp_path, False))
