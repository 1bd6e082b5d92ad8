"""Objects in a checkpoint, and differences between it and the state that are named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.errors import (
    LoadFailedError,
    ManifestError,
    SaveFailedError,
    StateError,
    StateMismatchError,
)
from everstep.checkpoint.torch_state import (
    State,
    load_objects,
    object_destinations,
    split_objects,
)
from tests.support.checkpoints import Counter, Holder, fresh_state, save_and_load, tiny_state

# Objects, and what does not fit


def test_objects_come_back_exactly(tmp_path: Path) -> None:
    value = {"position": 2**60, "pair": (1, 2), 30: float("inf"), "nested": [{"x": None}]}
    saved = State(model=Holder(), first=Counter(value), second=Counter("text"))
    loaded = State(model=Holder(), first=Counter(), second=Counter())
    save_and_load(tmp_path, saved, loaded)
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
    checkpointer = save_and_load(tmp_path, saved, loaded)
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
        split_objects(State(model=Holder(), x=Counter(value)))


@pytest.mark.parametrize("coded", [{"$tensor": "object.data.x"}, {"$tensor": 3}], ids=str)
def test_a_tensor_of_an_object_that_is_not_there(coded: Any) -> None:
    state = State(model=nn.Identity(), data=Counter())
    with pytest.raises(ManifestError, match=r"^dir is damaged: its objects"):
        object_destinations(state, {"object.data": {"value": coded}}, {}, "dir")
    with pytest.raises(ManifestError, match=r"^dir is damaged: its objects"):
        load_objects(state, {"object.data": {"value": coded}}, "dir")


def test_an_object_without_state_is_refused() -> None:
    with pytest.raises(StateError, match="got OrderedDict, expected the nn"):
        State(model=nn.Linear(1, 1).state_dict())  # type: ignore[arg-type]
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
        save_and_load(tmp_path, saved, loaded)
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
