"""Live torch state: names, tensors of every kind, optimizers, objects, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.errors import (
    LayoutError,
    LoadFailedError,
    ManifestError,
    SaveFailedError,
    StateError,
    StateMismatchError,
)
from everstep.checkpoint.layout import TensorSpec
from everstep.checkpoint.torch_layout import DTYPES, live_tensor
from everstep.checkpoint.torch_optimizer import materialise
from everstep.checkpoint.torch_state import (
    State,
    load_objects,
    named_tensors,
    object_destinations,
    objects_of,
    optimizer_of,
    tensors_of,
)
from tests.support.checkpoints import Counter, bits, fresh_state, tiny_state, train_step


class Holder(nn.Module):
    """Any tensors as buffers."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def _save_and_load(tmp_path: Path, saved: State, loaded: State) -> Checkpointer:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.load(saved)
        checkpointer.save(4, saved)
        assert checkpointer.load(loaded) == 5
    return checkpointer


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
    _save_and_load(
        tmp_path, State(model=Holder(x=tensor, other=torch.ones(2))), State(model=loaded)
    )
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
    _save_and_load(tmp_path, State(model=Holder(x=view(_arange()))), State(model=loaded))
    assert torch.equal(loaded.x, view(_arange()))
    expected = torch.full((4, 6), -1.0)
    view(expected).copy_(view(_arange())) if view is not VIEWS["channels last"] else None
    assert torch.equal(around, expected)


def test_expanded_tensors_are_saved_as_they_look(tmp_path: Path) -> None:
    loaded = Holder(x=torch.zeros(3, 4))
    wide = State(model=Holder(x=torch.arange(4.0).expand(3, 4)))
    _save_and_load(tmp_path, wide, State(model=loaded))
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
    _save_and_load(tmp_path, State(model=saved), State(model=loaded))
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
    _save_and_load(tmp_path, *states)
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


# Optimizers


def _optimizers() -> dict[str, Callable[[Any], torch.optim.Optimizer]]:
    return {
        "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
        "adamw plain": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False, amsgrad=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
        "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
        "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
        "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
        "adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
        "asgd": lambda p: torch.optim.ASGD(p, lr=0.1),
        "radam": lambda p: torch.optim.RAdam(p, lr=0.1),
        "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
        "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    }


def _with_optimizer(build: Callable[[Any], torch.optim.Optimizer]) -> State:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    model.register_parameter("scale", nn.Parameter(torch.tensor(2.0)))
    model.register_parameter("unused", nn.Parameter(torch.tensor(2.0)))
    decay = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = build([{"params": decay}, {"params": others, "weight_decay": 0.0}])
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3, 4])
    return State(model=model, optimizer=optimizer, scheduler=scheduler)


def _step(state: State) -> None:
    (state.model(torch.randn(4, 3)) * state.model.scale).square().sum().backward()
    assert state.optimizer is not None
    state.optimizer.step()
    state.objects["scheduler"].step()  # type: ignore[attr-defined]
    state.optimizer.zero_grad()


@pytest.mark.parametrize("build", _optimizers().values(), ids=_optimizers())
def test_training_goes_on_exactly(
    tmp_path: Path, build: Callable[[Any], torch.optim.Optimizer]
) -> None:
    saved, loaded = _with_optimizer(build), _with_optimizer(build)
    for _ in range(3):
        _step(saved)
    _save_and_load(tmp_path, saved, loaded)
    assert bits(loaded) == bits(saved)
    after_load = torch.get_rng_state()
    for state in (saved, loaded):
        torch.set_rng_state(after_load)
        for _ in range(2):
            _step(state)
    assert bits(loaded) == bits(saved)
    assert saved.optimizer is not None
    assert loaded.optimizer is not None
    for mine, theirs in zip(
        loaded.optimizer.param_groups, saved.optimizer.param_groups, strict=True
    ):
        assert mine["lr"] == theirs["lr"]
        assert type(mine.get("betas")) is type(theirs.get("betas"))


def test_before_the_first_update_there_is_no_state_and_a_load_leaves_none(tmp_path: Path) -> None:
    saved, loaded = fresh_state(), tiny_state()
    _save_and_load(tmp_path, saved, loaded)
    assert loaded.optimizer is not None
    assert not loaded.optimizer.state
    assert bits(loaded) == bits(saved)


def test_a_load_into_a_trained_state_replaces_it(tmp_path: Path) -> None:
    saved, loaded = tiny_state(1), tiny_state(2)
    train_step(loaded)
    _save_and_load(tmp_path, saved, loaded)
    assert bits(loaded) == bits(saved)


def test_how_updates_are_computed_is_up_to_the_run(tmp_path: Path) -> None:
    saved, loaded = tiny_state(1), tiny_state(2)
    assert loaded.optimizer is not None
    loaded.optimizer.param_groups[0].update(fused=False, foreach=True, lr=0.7)
    _save_and_load(tmp_path, saved, loaded)
    group = loaded.optimizer.param_groups[0]
    assert (group["fused"], group["foreach"], group["lr"]) == (False, True, 0.1)
    train_step(loaded)


@pytest.mark.parametrize("fused", [True, False])
def test_state_is_made_where_the_optimizer_wants_it(fused: bool) -> None:
    parameter = nn.Parameter(torch.zeros((), device="meta"))
    optimizer = torch.optim.AdamW([parameter], foreach=not fused)
    optimizer.param_groups[0]["fused"] = fused
    stored = {
        f"optimizer.p.{key}": TensorSpec(f"optimizer.p.{key}", "F32", ())
        for key in ("step", "exp_avg")
    }
    materialise([optimizer], {parameter: "p"}, stored)
    made = optimizer.state[parameter]
    assert made["exp_avg"].device.type == "meta"
    assert made["step"].device.type == ("meta" if fused else "cpu")


def test_an_optimizer_of_another_model_is_refused() -> None:
    odd = torch.optim.SGD(nn.Linear(2, 3).parameters())
    with pytest.raises(StateError, match=r"parameter of shape \(3, 2\) that is not in the model"):
        tensors_of(State(model=nn.Linear(2, 3), optimizer=odd))


@pytest.mark.parametrize(("key", "says"), [("a.b", "'a.b'"), (3, "key 3")])
def test_state_keys_that_are_no_names(key: object, says: str) -> None:
    state = tiny_state()
    assert state.optimizer is not None
    next(iter(state.optimizer.state.values()))[key] = 1
    with pytest.raises(StateError, match=says):
        tensors_of(state)


def test_state_of_no_parameter_is_refused() -> None:
    state = tiny_state()
    assert state.optimizer is not None
    state.optimizer.state["global"]["count"] = 1  # type: ignore[index]
    with pytest.raises(StateError, match="'global', which is no parameter"):
        optimizer_of(state)


def test_a_tensor_among_the_plain_values_is_named() -> None:
    state = tiny_state()
    state.optimizers[0].param_groups[0]["lr"] = torch.tensor([0.1, 0.2])
    with pytest.raises(StateError, match=r"optimizer\.groups\[0\]\.lr is a Tensor"):
        optimizer_of(state)


def test_a_learning_rate_that_is_a_tensor_stays_the_same_tensor(tmp_path: Path) -> None:
    saved, loaded, plain = tiny_state(1), tiny_state(2), tiny_state(3)
    lr = torch.tensor(0.7)
    saved.optimizers[0].param_groups[0]["lr"] = torch.tensor(1 / 3)
    loaded.optimizers[0].param_groups[0]["lr"] = lr
    _save_and_load(tmp_path / "tensor", saved, loaded)
    assert loaded.optimizers[0].param_groups[0]["lr"] is lr
    assert torch.equal(lr, torch.tensor(1 / 3))
    _save_and_load(tmp_path / "number", loaded, plain)
    assert plain.optimizers[0].param_groups[0]["lr"] == lr.item()


def _two_optimizers(form: Callable[[Any, Any], Any]) -> State:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    first = torch.optim.AdamW(model[0].parameters(), lr=0.1)
    second = torch.optim.SGD(model[1].parameters(), lr=0.2, momentum=0.9)
    return State(model=model, optimizer=form(first, second))


@pytest.mark.parametrize(
    "form", [lambda a, b: [a, b], lambda a, b: {"a": a, "b": b}], ids=["sequence", "mapping"]
)
def test_several_optimizers(tmp_path: Path, form: Callable[[Any, Any], Any]) -> None:
    saved, loaded = _two_optimizers(form), _two_optimizers(lambda a, b: (a, b))
    saved.model(torch.randn(4, 3)).square().sum().backward()
    for optimizer in saved.optimizers:
        optimizer.step()
    saved.optimizers[1].param_groups[0]["lr"] = 0.3
    _save_and_load(tmp_path, saved, loaded)
    found, expected = tensors_of(loaded), tensors_of(saved)
    assert found.keys() == expected.keys()
    assert {"optimizer.0.weight.exp_avg", "optimizer.1.bias.momentum_buffer"} <= found.keys()
    assert all(torch.equal(found[n].local, expected[n].local) for n in found)
    assert loaded.optimizers[1].param_groups[0]["lr"] == 0.3


def test_optimizers_over_the_same_parameter_are_refused() -> None:
    model = nn.Linear(2, 2)
    both = [torch.optim.SGD(model.parameters()), torch.optim.SGD([model.bias])]
    with pytest.raises(StateError, match="two optimizers hold the parameter 'bias'"):
        optimizer_of(State(model=model, optimizer=both))


def test_an_optimizer_with_one_history_for_all_parameters_is_refused() -> None:
    model = nn.Linear(2, 2)
    state = State(model=model, optimizer=torch.optim.LBFGS(model.parameters()))
    with pytest.raises(StateError, match="LBFGS keeps one history"):
        tensors_of(state)


# Objects, and what does not fit


def test_objects_come_back_exactly(tmp_path: Path) -> None:
    value = {"position": 2**60, "pair": (1, 2), 30: float("inf"), "nested": [{"x": None}]}
    saved = State(model=Holder(), first=Counter(value), second=Counter("text"))
    loaded = State(model=Holder(), first=Counter(), second=Counter())
    _save_and_load(tmp_path, saved, loaded)
    assert [repr(o.state_dict()) for o in loaded.objects.values()] == [
        repr(o.state_dict()) for o in saved.objects.values()
    ]


def test_tensors_in_the_state_of_objects_come_back_as_new_ones(tmp_path: Path) -> None:
    table = torch.arange(12.0).reshape(3, 4).t()
    value = {
        "average": {"layer.weight": table, "flag": torch.tensor(True)},
        "history": [torch.zeros(0, 2), (torch.ones(2, dtype=torch.bfloat16), "x")],
        "steps": 7,
        3: torch.tensor(2**60),
    }
    saved = State(model=Holder(), ema=Counter(value), other=Counter())
    loaded = State(model=Holder(), ema=Counter({"average": 1}), other=Counter())
    checkpointer = _save_and_load(tmp_path, saved, loaded)
    manifest = checkpointer.inspect()
    assert manifest is not None
    assert {n for n in manifest.tensors if n.startswith("object.")} == {
        f"object.ema.value.{n}"
        for n in ("average.layer.weight", "average.flag", "history[0]", "history[1][0]", "3")
    }
    found = loaded.objects["ema"].state_dict()["value"]
    assert repr(found) == repr(value)
    assert found["average"]["layer.weight"].data_ptr() != table.data_ptr()


def test_two_tensors_of_an_object_with_one_name_are_refused() -> None:
    value = {"a.b": torch.zeros(1), "a": {"b": torch.zeros(1)}}
    with pytest.raises(StateError, match=r"the name 'object\.x\.value\.a\.b'"):
        objects_of(State(model=Holder(), x=Counter(value)))


@pytest.mark.parametrize("coded", [{"$tensor": "object.data.x"}, {"$tensor": 3}], ids=str)
def test_a_tensor_of_an_object_that_is_not_there(coded: Any) -> None:
    state = State(model=nn.Identity(), data=Counter())
    with pytest.raises(ManifestError, match=r"^dir is damaged: its objects"):
        object_destinations(state, {"object.data": {"value": coded}}, {}, "dir")
    with pytest.raises(ManifestError, match=r"^dir is damaged: its objects"):
        load_objects(state, {"object.data": {"value": coded}}, "dir")


class FullyShardedDataParallel(nn.Linear):
    """Known by its name, as torch's is."""


def test_shards_that_do_not_say_what_they_are_are_refused() -> None:
    model = nn.Sequential(FullyShardedDataParallel(2, 2))
    with pytest.raises(StateError, match=r"module '0' is wrapped .*: use fully_shard"):
        named_tensors(model)


def test_an_object_without_state_is_refused() -> None:
    with pytest.raises(StateError, match=r"State\(data=...\): int has no state_dict"):
        State(model=nn.Identity(), data=3)  # type: ignore[arg-type]


def test_a_state_that_is_not_plain_fails_the_save(tmp_path: Path) -> None:
    state = State(model=nn.Identity(), data=Counter({1, 2}))
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(SaveFailedError, match=r"rank 0: object\.data\.value is a set"):
            checkpointer.save(0, state)
        assert checkpointer.steps() == []
    assert not list(tmp_path.glob("step-*"))


def _mismatch(tmp_path: Path, saved: State, loaded: State) -> str:
    with pytest.raises(LoadFailedError) as caught:
        _save_and_load(tmp_path, saved, loaded)
    assert isinstance(caught.value.__cause__, StateMismatchError)
    return str(caught.value)


def test_missing_extra_and_other_tensors_are_named(tmp_path: Path) -> None:
    saved = Holder(a=torch.zeros(2), b=torch.zeros(2), c=torch.zeros(2))
    loaded = Holder(b=torch.zeros(3), c=torch.zeros(2, dtype=torch.int32), d=torch.zeros(1))
    text = _mismatch(tmp_path, State(model=saved), State(model=loaded))
    for words in (
        "tensor 'model.d' is not in the checkpoint",
        "the checkpoint's tensor 'model.a' is not in this run",
        "tensor 'model.b' is F32 [2] in the checkpoint and F32 [3] in this run",
        "tensor 'model.c' is F32 [2] in the checkpoint and I32 [2] in this run",
    ):
        assert words in text


def test_missing_and_extra_objects_are_named(tmp_path: Path) -> None:
    text = _mismatch(
        tmp_path,
        State(model=Holder(), old=Counter()),
        State(model=Holder(), new=Counter()),
    )
    assert "'object.new' is not in the checkpoint" in text
    assert "'object.old' is not in this run" in text


def test_an_optimizer_where_there_was_none(tmp_path: Path) -> None:
    plain = State(model=tiny_state().model)
    assert "'optimizer' is not in the checkpoint" in _mismatch(tmp_path, plain, fresh_state())


def test_other_parameter_groups_are_named(tmp_path: Path) -> None:
    saved = State(model=nn.Linear(2, 2), optimizer=None)
    saved.optimizer = torch.optim.SGD(saved.model.parameters())
    loaded = State(model=nn.Linear(2, 2), optimizer=None)
    loaded.optimizer = torch.optim.SGD(
        [{"params": [loaded.model.weight]}, {"params": [loaded.model.bias]}]
    )
    text = _mismatch(tmp_path, saved, loaded)
    assert "the optimizer has 2 parameter groups, 1 were saved; group 0 differs in bias" in text


def test_objects_that_nobody_wrote() -> None:
    state = State(model=nn.Identity(), data=Counter())
    with pytest.raises(ManifestError, match=r"^dir is damaged: its objects cannot be decoded"):
        load_objects(state, {"object.data": {"$pairs": [[[1], 2]]}}, "dir")


def test_a_plain_tensor_is_whole_on_every_rank() -> None:
    tensor = live_tensor("x", nn.Parameter(torch.zeros(2, 3)))
    assert tensor.fragment.box == tensor.fragment.spec.whole
    assert not tensor.local.requires_grad
