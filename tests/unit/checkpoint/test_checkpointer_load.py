"""What of a checkpoint is loaded, where not all of it is wanted."""

from pathlib import Path
from typing import Any

import pytest
import torch

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.errors import (
    LoadFailedError,
)
from everstep.checkpoint.torch_state import State
from tests.support.checkpoints import (
    Counter,
    bits,
    fresh_state,
    tiny_state,
)

# Parts of a state


def test_only_what_is_asked_for_is_loaded(tmp_path: Path) -> None:
    state = tiny_state(data=Counter(3))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    saved = bits(state)
    draws = float(torch.rand(()))

    def load(*include: str) -> tuple[dict[str, bytes], Any, bool]:
        fresh = fresh_state(data=Counter(0))
        with Checkpointer(tmp_path, read_only=True) as reader:
            assert reader.load(fresh, include=include) == 2
            assert reader.loaded is not None
            restored = reader.loaded.rng_restored
        return bits(fresh), fresh.objects["data"].value, restored

    untouched = bits(fresh_state())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found, value, restored = load("model")
    model = {k: v for k, v in saved.items() if k.startswith("model.")}
    assert (found, value, restored) == (model, 0, False)
    found, value, _ = load("objects")
    assert (found, value) == (untouched, 3)
    found, _, _ = load("optimizer")
    assert found == saved | untouched
    assert not torch.equal(torch.get_rng_state(), before)  # fresh_state() seeds
    _, _, restored = load("rng")
    assert restored
    assert float(torch.rand(())) == draws
    found, value, restored = load("model", "optimizer", "objects", "rng")
    assert (found, value, restored) == (saved, 3, True)


@pytest.mark.parametrize("include", [["weights"], [], "model", ["model", "modle"]])
def test_parts_that_there_are_not(tmp_path: Path, include: Any) -> None:
    with pytest.raises(ValueError, match="expected a list of some of model, optimizer"):
        Checkpointer(tmp_path, read_only=True).load(tiny_state(), include=include)


def test_a_model_is_loaded_for_a_run_without_optimizer(tmp_path: Path) -> None:
    state = tiny_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    model = State(model=fresh_state().model)
    with Checkpointer(tmp_path, read_only=True) as reader:
        reader.load(model, include=["model"])
        with pytest.raises(LoadFailedError, match="is not in this run") as refused:
            reader.load(model)
    assert "load the model alone (include=['model'])" in str(refused.value)
    assert bits(model) == {k: v for k, v in bits(state).items() if k.startswith("model.")}


def test_progress_of_a_load_is_told(tmp_path: Path) -> None:
    seen: list[int] = []
    state = tiny_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        checkpointer.load(state, on_bytes=seen.append)
        manifest = checkpointer.inspect(1)
    assert manifest is not None
    assert seen == sorted(seen)
    assert seen[-1] == manifest.packs[0].data_bytes
