"""What is copied late, what at once, and what becomes of a state that changes its shape."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.errors import StateError
from everstep.checkpoint.snapshots.live_state import LiveState
from everstep.checkpoint.snapshots.watch import Watch
from everstep.checkpoint.torch_layout import DTYPES
from everstep.checkpoint.torch_state import State
from tests.support.checkpoints import Counter, Holder, tiny_state, train_step
from tests.support.snapshot_checks import ALONE, SealedCopies, differences, moment


def late(state: State, **options: Any) -> set[str]:
    """The names of what is copied late."""
    live = LiveState(state, ALONE, **options)
    found = {**live.fixed, **live.first.moving}
    return {f.spec.name for f, tensor in found.items() if live.is_late(f, tensor)}


def test_what_only_optimizers_change_is_late() -> None:
    state = tiny_state(ema=Counter(torch.ones(3)))
    names = {f.spec.name for f in LiveState(state, ALONE).fragments}
    at_once = {name for name in names if "running" in name or "tracked" in name}
    at_once |= {name for name in names if name.startswith(("rng.", "object."))}
    assert late(state) == names - at_once
    assert "object.ema.value" in late(state, lazy_objects=["ema"])


def test_parameters_that_others_change_are_taken_at_once() -> None:
    model = nn.ModuleDict(
        {
            "renormalised": nn.Embedding(4, 3, max_norm=1.0),
            "bag": nn.EmbeddingBag(4, 3, max_norm=1.0),
            "own": nn.Linear(3, 3),
            "foreign": nn.Linear(3, 3),
            "frozen": nn.Linear(3, 3).requires_grad_(False),
        }
    )
    mine = [*model["renormalised"].parameters(), *model["bag"].parameters()]
    state = State(
        model=model, optimizer=torch.optim.SGD([*mine, *model["own"].parameters()], lr=0.1)
    )
    found = {name.split(".")[1] for name in late(state)}
    assert found == {"own", "frozen"}


def test_memory_that_is_a_buffer_as_well_is_taken_at_once() -> None:
    model = nn.Linear(3, 3, bias=False)
    model.register_buffer("alias", model.weight.detach())
    assert not late(State(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)))


def test_an_optimizer_inside_of_backward_is_refused_unless_it_is_in_the_state() -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD([model.weight], lr=0.1)
    model.weight._in_backward_optimizers = [optimizer]  # type: ignore[attr-defined]
    LiveState(State(model=model, optimizer=optimizer), ALONE)
    with pytest.raises(StateError, match=r"'weight' is updated inside of backward .*optimizer=\["):
        LiveState(State(model=model, optimizer=torch.optim.SGD([model.bias], lr=0.1)), ALONE)


def _changes() -> dict[str, Any]:
    def replace_layer(state: State) -> None:
        state.model[0] = nn.Linear(3, 5)  # type: ignore[operator]

    def replace_data(state: State) -> None:
        state.model[0].weight.data = torch.zeros(5, 3)  # type: ignore[index]

    def replace_buffer(state: State) -> None:
        state.model[1].running_mean = torch.zeros(5)  # type: ignore[index]

    def assign(state: State) -> None:
        state.model.load_state_dict(copy.deepcopy(state.model.state_dict()), assign=True)

    def load_optimizer(state: State) -> None:
        state.optimizers[0].load_state_dict(copy.deepcopy(state.optimizers[0].state_dict()))

    def forget(state: State) -> None:
        state.optimizers[0].state.clear()

    def new_state(state: State) -> None:
        optimizer = state.optimizers[0]
        parameter = optimizer.param_groups[0]["params"][0]
        optimizer.state[parameter] = dict(optimizer.state[parameter])

    def drop_group(state: State) -> None:
        state.optimizers[0].param_groups[0]["params"].pop()

    def swap(state: State) -> None:
        held = state.optimizers[0].param_groups[0]["params"]
        held[0], held[1] = held[1], held[0]

    def hide_buffer(state: State) -> None:
        state.model[1]._non_persistent_buffers_set.add("running_mean")  # type: ignore[index]

    return {name: change for name, change in locals().items() if callable(change)}


@pytest.mark.parametrize("name", _changes())
def test_a_watch_sees_every_change(name: str) -> None:
    state = tiny_state()
    watch = Watch(state)
    assert watch.unchanged(state)
    train_step(state)
    state.optimizers[0].zero_grad(set_to_none=True)
    with torch.no_grad():
        state.model[0].weight.add_(1)  # type: ignore[index]
    assert watch.unchanged(state)
    assert watch.unchanged(State(model=state.model, optimizer=state.optimizers[0]))
    assert not watch.unchanged(State(model=state.model))
    _changes()[name](state)
    assert not watch.unchanged(state)


def _saves(folder: Path, state: State, *changes: Any) -> list[int]:
    """Save with changes in between; the steps that were captured, all of them right."""
    memory = SealedCopies()
    taken = []
    with Checkpointer(folder, memory=memory) as checkpointer:
        checkpointer.load(state)
        for step, change in enumerate((None, None, *changes)):
            if change is not None:
                change(state)
            wanted = moment(state)
            if checkpointer.save(step, state).skipped is None:
                checkpointer.wait_captured()
                assert not differences(wanted, memory.take(step))
                taken.append(step)
            checkpointer.wait_captured()
    return taken


def test_tensors_replaced_by_their_like_are_found_without_a_new_plan(tmp_path: Path) -> None:
    changes = _changes()
    state = tiny_state()
    like = [changes[n] for n in ("replace_data", "replace_buffer", "load_optimizer", "new_state")]
    assert _saves(tmp_path, state, *like, *like) == list(range(10))


def test_strides_may_change(tmp_path: Path) -> None:
    def transpose(state: State) -> None:
        weight = state.model[0].weight  # type: ignore[index]
        weight.data = torch.randn(3, 5).t()

    assert _saves(tmp_path, tiny_state(), transpose, train_step) == [0, 1, 2, 3]


def _more_layers(state: State) -> None:
    layer = nn.Linear(2, 3)
    state.model.append(layer)  # type: ignore[operator]
    state.model.forward = state.model[:3].forward  # type: ignore[method-assign,index]
    state.optimizers[0].add_param_group({"params": list(layer.parameters())})


def test_another_layout_is_planned_anew(tmp_path: Path) -> None:
    taken = _saves(tmp_path, tiny_state(), _more_layers, None, None, None)
    assert taken[:2] == [0, 1]
    assert taken[-1] == 5  # one save finds out, one forgets what others have captured
    assert len(taken) >= 4


def test_parameters_may_be_frozen_and_thawed(tmp_path: Path) -> None:
    def freeze(state: State) -> None:
        state.model[0].requires_grad_(False)  # type: ignore[index]

    def thaw(state: State) -> None:
        state.model[0].requires_grad_(True)  # type: ignore[index]

    assert _saves(tmp_path, tiny_state(), freeze, train_step, thaw, train_step) == list(range(6))


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_all_dtypes_and_shapes(tmp_path: Path) -> None:
    def tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        n_bytes = torch.empty((), dtype=dtype).element_size()
        numbers = torch.randint(0, 2, (*shape, n_bytes), dtype=torch.uint8)
        return numbers.view(dtype).reshape(shape)

    torch.manual_seed(3)
    buffers = {
        f"{name}_{number}": tensor(dtype, *shape)
        for name, dtype in DTYPES.items()
        for number, shape in enumerate([(3, 4), (), (0, 2), (5,)])
    }
    model = Holder(**buffers)
    for name in ("F32", "BF16", "C64", "F64"):
        value = tensor(DTYPES[name], 4, 3)
        model.register_parameter(f"p_{name}", nn.Parameter(value.t(), requires_grad=False))
    model.register_buffer("wide", torch.randn(4, 1).expand(4, 5))
    assert _saves(tmp_path, State(model=model)) == [0, 1]
