"""State on several meshes, and sizes that do not divide, over real process groups."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.torch_collective import ProcessGroupCollective
from everstep.checkpoint.torch_state import State
from tests.support.checkpoints import Counter
from tests.support.spawn import run_ranks

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(300)]

EXPERTS = 6
Digests = dict[str, bytes]


class Experts(nn.Module):
    """A dense layer beside the weights of several experts, and what a router has counted."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(5, 3)
        self.experts = nn.Parameter(torch.zeros(EXPERTS, 3, 4))
        self.bias = nn.Parameter(torch.zeros(EXPERTS, 4))


def _spread(model: Experts, ep: int, world_size: int) -> None:
    """Experts over ``ep`` ranks, the same ones on every such group; the rest over all ranks."""
    if world_size == 1:
        return
    mesh = init_device_mesh("cpu", (world_size // ep, ep), mesh_dim_names=("dp", "ep"))
    for name in ("experts", "bias"):
        whole = getattr(model, name).detach()
        setattr(model, name, nn.Parameter(distribute_tensor(whole, mesh["ep"], [Shard(0)])))
    fully_shard(model.dense, mesh=init_device_mesh("cpu", (world_size,)))


def _update(state: State, seed: int) -> None:
    """One update with gradients that depend on the seed and the logical tensor only."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in state.model.parameters():
        whole = torch.randn(parameter.shape, generator=generator)
        parameter.grad = (
            distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            if isinstance(parameter, DTensor)
            else whole
        )
    for optimizer in state.optimizers:
        optimizer.step()


def _whole(value: torch.Tensor) -> bytes:
    full = value.full_tensor() if isinstance(value, DTensor) else value
    return np.ascontiguousarray(full.detach().numpy()).tobytes()


def _digests(state: State) -> Digests:
    found = {}
    for name, parameter in state.model.named_parameters():
        found[name] = _whole(parameter)
        for optimizer in state.optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                found[f"{name} {key}"] = _whole(value)
    return found


def _average(state: State) -> dict[str, Any]:
    """An object whose state has shards of its own, as an average of the weights does."""
    return {n: (p.detach() * 2) for n, p in state.model.named_parameters()}


def _resume_experts(rank: int, world_size: int, ep: int, root: str) -> tuple[Digests, Digests]:
    """Loads what there is, makes an update, saves; what was loaded, and what was saved."""
    torch.manual_seed(rank + 10 * world_size)
    model = Experts()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    _spread(model, ep, world_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    average = Counter()
    state = State(model=model, optimizer=optimizer, average=average)
    average.value = _average(state)
    collective = ProcessGroupCollective(timeout_s=30)
    with Checkpointer(root, collective=collective, keep=9) as checkpointer:
        step = checkpointer.load(state)
        found = _digests(state) | {f"average {n}": _whole(t) for n, t in average.value.items()}
        if step == 0:  # the same on every rank from here on
            for parameter in model.parameters():
                with torch.no_grad():
                    parameter.fill_(1.0)
        _update(state, step)
        average.value = _average(state)
        checkpointer.save(step, state)
        saved = _digests(state) | {f"average {n}": _whole(t) for n, t in average.value.items()}
    return found, saved


def test_experts_on_a_mesh_of_their_own_move_to_fewer_ranks(tmp_path: Path) -> None:
    saved: Digests | None = None
    for ep, world_size in ((4, 4), (2, 2), (1, 1), (2, 4)):
        results = run_ranks(_resume_experts, world_size, ep, str(tmp_path))
        for found, _ in results:
            assert saved is None or found == saved
        saved = results[0][1]
    assert saved is not None
    assert len(saved) == 4 * 5
    with Checkpointer(tmp_path, read_only=True) as reader:
        manifest = reader.inspect(0)
    assert manifest is not None
    assert manifest.tensors["model.experts"].grid.cells_per_dim == (3, 1, 1)  # ep 4: 2, 2, 2, 0
    assert manifest.tensors["object.average.value.experts"].grid.n_cells == 3


class Factored(torch.optim.Optimizer):
    """Keeps the mean square of every row only, as Adafactor does (torch's refuses DTensors)."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                grad, state = parameter.grad, self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["row_var"] = grad.new_zeros((*grad.shape[:-1], 1))
                state["step"] += 1
                state["row_var"].lerp_(grad.square().mean(-1, keepdim=True), 1 / state["step"])
                parameter.sub_(grad / (1 + state["row_var"]) * group["lr"])


def _resume_factored(rank: int, world_size: int, root: str) -> None:
    """The state has other shapes than the parameters that it belongs to."""

    def build() -> State:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
        if world_size > 1:
            fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
        return State(model=model, optimizer=Factored(model.parameters()))

    first, second = build(), build()
    with Checkpointer(root, collective=ProcessGroupCollective(timeout_s=30)) as checkpointer:
        checkpointer.load(first)
        _update(first, 0)
        _update(first, 1)
        checkpointer.save(1, first)
        assert checkpointer.load(second) == 2
    assert _digests(second) == _digests(first)
    assert any("row_var" in name for name in _digests(first))
    for state in (first, second):
        _update(state, 2)
    assert _digests(second) == _digests(first)


def test_state_of_other_shapes_than_its_parameters(tmp_path: Path) -> None:
    run_ranks(_resume_factored, 2, str(tmp_path))


class Numbered(nn.Module):
    """Parameters of sizes for which torch's own offsets of shards are wrong, cut over ``tp``."""

    def __init__(self, n: int, tp_mesh: DeviceMesh | None, filled: bool) -> None:
        super().__init__()
        for name, shape, dim in (("vector", (n,), 0), ("columns", (n, 3), 0), ("rows", (3, n), 1)):
            count = float(torch.Size(shape).numel())
            whole = torch.arange(count) if filled else torch.full((int(count),), -1.0)
            tensor = whole.reshape(shape)
            if tp_mesh is not None:
                tensor = distribute_tensor(tensor, tp_mesh, [Shard(dim)])
            self.register_parameter(name, nn.Parameter(tensor))


SIZES = (7, 13, 1001)


def _numbered(dp: int, tp: int, filled: bool) -> nn.Module:
    if dp * tp == 1:
        return nn.ModuleList(Numbered(n, None, filled) for n in SIZES)
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    models = nn.ModuleList(Numbered(n, mesh["tp"], filled) for n in SIZES)
    for model in models:
        fully_shard(model, mesh=mesh["dp"])
    return models


def _resume_numbered(rank: int, world_size: int, dp: int, tp: int, root: str, first: bool) -> bool:
    model = _numbered(dp, tp, filled=first)
    with Checkpointer(root, collective=ProcessGroupCollective(timeout_s=60)) as checkpointer:
        step = checkpointer.load(State(model=model))
        assert (step == 0) is first
        checkpointer.save(step, State(model=model))
    for name, parameter in model.named_parameters():
        found = np.frombuffer(_whole(parameter), np.float32)
        assert found.tolist() == list(range(parameter.numel())), name
    return True


def _check_numbered(tmp_path: Path, meshes: list[tuple[int, int]]) -> None:
    for number, (dp, tp) in enumerate(meshes):
        args = (dp, tp, str(tmp_path), number == 0)
        assert all(run_ranks(_resume_numbered, dp * tp, *args))


def test_sizes_that_do_not_divide(tmp_path: Path) -> None:
    _check_numbered(tmp_path, [(3, 2), (1, 1)])


@pytest.mark.slow
def test_sizes_that_do_not_divide_on_many_meshes(tmp_path: Path) -> None:
    _check_numbered(tmp_path, [(4, 2), (3, 2), (2, 2), (5, 1), (2, 3), (4, 2), (1, 1), (3, 2)])
