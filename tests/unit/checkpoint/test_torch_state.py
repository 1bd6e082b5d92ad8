"""Live torch state: names, tensors of every kind, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from everstep.checkpoint.errors import (
    LayoutError,
    StateError,
)
from everstep.checkpoint.torch_layout import DTYPES, live_tensor
from everstep.checkpoint.torch_state import (
    State,
    named_tensors,
    tensors_of,
)
from tests.support.checkpoints import (
    Holder,
    bits,
    save_and_load,
)

# Tensors


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (3, 4)], ids=str)
def test_every_dtype_and_shape(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    dtype = DTYPES[name]
    count = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    tensor = data.view(dtype).reshape(shape)
    loaded = Holder(x=torch.zeros_like(data).view(dtype).reshape(shape), other=torch.zeros(2))
    save_and_load(tmp_path, State(model=Holder(x=tensor, other=torch.ones(2))), State(model=loaded))
    assert loaded.x.reshape(-1).view(torch.uint8).tolist() == data.tolist()


def _arange() -> torch.Tensor:
    return torch.arange(24.0).reshape(4, 6)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda t: t.t(),
    "sliced": lambda t: t[1:3, ::2],
    "channels last": lambda t: t.reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    "offset": lambda t: t.reshape(-1)[5:],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_tensors_that_are_not_contiguous(
    tmp_path: Path, view: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    around = torch.full((4, 6), -1.0)
    loaded = Holder(x=view(around))
    save_and_load(tmp_path, State(model=Holder(x=view(_arange()))), State(model=loaded))
    assert torch.equal(loaded.x, view(_arange()))
    expected = torch.full((4, 6), -1.0)
    view(expected).copy_(view(_arange())) if view is not VIEWS["channels last"] else None
    assert torch.equal(around, expected)


def test_expanded_tensors_are_saved_as_they_look(tmp_path: Path) -> None:
    loaded = Holder(x=torch.zeros(3, 4))
    wide = State(model=Holder(x=torch.arange(4.0).expand(3, 4)))
    save_and_load(tmp_path, wide, State(model=loaded))
    assert torch.equal(loaded.x, torch.arange(4.0).expand(3, 4))


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.empty(2, dtype=torch.bits8), "dtype torch.bits8"),
        (torch.zeros(2, device="meta"), "meta device"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.zeros(2, dtype=torch.complex64).conj(), "conjugate"),
    ],
)
def test_tensors_that_cannot_be_saved_are_named(tensor: torch.Tensor, says: str) -> None:
    with pytest.raises(LayoutError, match=rf"'model\.deep\.x'.*{says}"):
        tensors_of(State(model=nn.ModuleDict({"deep": Holder(x=tensor)})))


# Names


def _block() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def _names(model: nn.Module) -> list[str]:
    return sorted(named_tensors(model))


PLAIN = sorted(f"{i}.{n}" for i in "01" for n in _names(_block()))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "wrap",
    [
        checkpoint_wrapper,
        torch.compile,
        lambda m: torch.compile(checkpoint_wrapper(m)),
        lambda m: checkpoint_wrapper(torch.compile(m)),
        lambda m: checkpoint_wrapper(checkpoint_wrapper(m)),
    ],
    ids=["recomputed", "compiled", "compiled(recomputed)", "recomputed(compiled)", "twice"],
)
@pytest.mark.parametrize("where", ["root", "block", "both"])
def test_names_do_not_depend_on_wrappers(wrap: Callable[[Any], Any], where: str) -> None:
    model: Any = nn.Sequential(_block(), _block())
    if where != "root":
        model[1] = wrap(model[1])
    if where != "block":
        model = wrap(model)
    assert _names(model) == PLAIN


def test_names_of_a_child_that_is_only_called_like_a_wrapper() -> None:
    model = nn.ModuleDict({"module": nn.Linear(1, 1), "_orig_mod": nn.Linear(1, 1)})
    assert _names(model) == [
        "_orig_mod.bias",
        "_orig_mod.weight",
        "module.bias",
        "module.weight",
    ]


def test_tied_parameters_are_saved_once_and_stay_tied(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
        model[1].weight = model[0].weight
        return model

    saved, loaded = tied(), tied()
    assert _names(saved) == ["0.weight"]
    save_and_load(tmp_path, State(model=saved), State(model=loaded))
    assert torch.equal(loaded[1].weight, saved[0].weight)
    assert loaded[1].weight is loaded[0].weight


def test_frozen_parameters_and_buffers(tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        model[0].weight.requires_grad_(False)
        model.register_buffer("kept", torch.rand(3))
        model.register_buffer("scratch", torch.rand(3), persistent=False)
        model.register_buffer("absent", None)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        return model, optimizer

    saved, loaded = build(), build()
    scratch = loaded[0].scratch.clone()
    saved[0](torch.rand(4, 2)).sum().backward()
    saved[1].step()
    states = [State(model=m, optimizer=o) for m, o in (saved, loaded)]
    assert "model.scratch" not in tensors_of(states[0])
    save_and_load(tmp_path, *states)
    assert bits(states[0]) == bits(states[1])
    assert loaded[0].kept.tolist() == saved[0].kept.tolist()
    assert torch.equal(loaded[0].scratch, scratch)


class Extra(nn.Module):
    def get_extra_state(self) -> int:
        return 1


def test_extra_state_is_refused() -> None:
    with pytest.raises(StateError, match=r"module '0\.1' defines get_extra_state"):
        named_tensors(nn.Sequential(nn.Sequential(nn.Identity(), Extra())))


def test_two_tensors_of_one_name_are_refused() -> None:
    model = checkpoint_wrapper(nn.Linear(1, 1))
    model.child = checkpoint_wrapper(nn.Linear(1, 1))
    model._checkpoint_wrapped_module.child = nn.Linear(1, 1)
    with pytest.raises(StateError, match=r"the name 'child\.weight'"):
        named_tensors(model)


class FullyShardedDataParallel(nn.Linear):
    """Known by its name, as torch's is."""


def test_shards_that_do_not_say_what_they_are_are_refused() -> None:
    model = nn.Sequential(FullyShardedDataParallel(2, 2))
    with pytest.raises(StateError, match=r"module '0' is wrapped .*: use fully_shard"):
        named_tensors(model)


def test_a_plain_tensor_is_whole_on_every_rank() -> None:
    tensor = live_tensor("x", nn.Parameter(torch.zeros(2, 3)))
    assert tensor.fragment.box == tensor.fragment.spec.whole
    assert not tensor.local.requires_grad
