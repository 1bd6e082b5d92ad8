"""What ``model.init_from`` refuses, and models of a user's own; layouts are in tests/multiproc."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.convert.errors import ConversionError
from everstep.checkpoint.convert.hf import export_hf
from everstep.checkpoint.errors import CheckpointError
from everstep.checkpoint.open_place import open_place
from everstep.checkpoint.torch_state import State
from everstep.trainer.architecture import ArchitectureNote
from everstep.trainer.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from everstep.trainer.errors import ConfigError
from everstep.trainer.init import materialise
from everstep.trainer.init_from import init_from
from everstep.trainer.model import build_model

VOCAB = 64
SHAPE = {"dim": 16, "layers": 1, "heads": 2, "ffn_dim": 24}


def config_of(path: Path | str | None, **model: Any) -> RunConfig:
    init = None if path is None else str(path)
    return RunConfig(
        train=TrainConfig(steps=1),
        model=ModelConfig(**SHAPE | {"init_from": init} | model),
        data=DataConfig(seq_len=8),
    )


def model_of(config: RunConfig, seed: int = 0) -> nn.Module:
    model = build_model(config.model, vocab_size=VOCAB, seq_len=8, seed=seed)
    materialise(model, torch.device("cpu"), seed)
    return model


@pytest.fixture
def memory() -> Iterator[str]:
    """A URL that holds nothing yet."""
    yield "memory://init-from/c"
    fsspec.filesystem("memory").rm("/init-from", recursive=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint ``c`` and what transformers gets of it, ``hf``."""
    config = config_of(None)
    state = State(model=model_of(config), architecture=ArchitectureNote(config, VOCAB))
    with Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save(0, state)
    with open_place(tmp_path / "c").open() as reader:
        export_hf(reader, tmp_path / "hf", dtype="BF16")
    return tmp_path


def test_weights_in_another_dtype(folder: Path) -> None:
    config = config_of(folder / "hf")
    model = model_of(config, seed=1)
    assert str(folder / "hf") in init_from(model, config, VOCAB)
    for name, parameter in model_of(config).named_parameters():
        expected = parameter.bfloat16().float()
        assert torch.equal(dict(model.named_parameters())[name], expected)


def test_a_checkpoint_at_a_url(memory: str) -> None:
    config = config_of(None)
    with Checkpointer(memory) as checkpointer:
        for step in (3, 5):
            model, note = model_of(config, seed=step), ArchitectureNote(config, VOCAB)
            checkpointer.save(step, State(model=model, architecture=note))
    for named, step in ((f"{memory}@3", 3), (f"{memory}/", 5)):
        model = model_of(config, seed=1)
        taken = init_from(model, config_of(named), VOCAB)
        assert taken == f"the weights of {memory}/step-{step:08d}-g00001"
        for name, parameter in model_of(config, seed=step).named_parameters():
            assert torch.equal(dict(model.named_parameters())[name], parameter)
    with pytest.raises(CheckpointError, match="/none holds no checkpoints"):
        init_from(model, config_of(f"{memory}/none"), VOCAB)


@pytest.mark.parametrize("source", ["hf", "c"])
def test_every_difference_is_told(folder: Path, source: str) -> None:
    config = config_of(folder / source, dim=32, rope_theta=500.0)
    with pytest.raises(ConfigError) as caught:
        init_from(model_of(config), config, VOCAB)
    for text in (
        "model.dim is 32 here and 16 there",
        "model.rope_theta is 500.0 here and 10000.0 there",
        "set these keys",
    ):
        assert text in str(caught.value)


def test_nothing_there(folder: Path) -> None:
    config = config_of(folder / "none")
    with pytest.raises(ConfigError, match=r"model.init_from: there is no .*none"):
        init_from(model_of(config), config, VOCAB)
    (folder / "hf" / "config.json").unlink()
    config = config_of(folder / "hf")
    with pytest.raises(CheckpointError, match=r"put the config.json"):
        init_from(model_of(config), config, VOCAB)


class Own(nn.Module):
    """A user's model, with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, VOCAB)
        self.register_buffer("seen", torch.arange(3))


def test_a_model_of_a_users_own(tmp_path: Path) -> None:
    values = Own()
    tensors = {n: t * 2 for n, t in values.state_dict().items()}
    save_file(tensors, tmp_path / "own.safetensors")
    config = config_of(tmp_path / "own.safetensors", factory="pkg:make")
    model = Own()
    init_from(model, config, VOCAB)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name])
    with Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save(0, State(model=model, optimizer=torch.optim.AdamW(model.parameters())))
    again = Own()
    init_from(again, config_of(tmp_path / "c", factory="pkg:make"), VOCAB)
    assert torch.equal(again.table.weight, model.table.weight)
    save_file({"other": torch.zeros(1)}, tmp_path / "own.safetensors")
    with pytest.raises(ConversionError, match=r"it lacks 'model.seen'"):
        init_from(model, config, VOCAB)
