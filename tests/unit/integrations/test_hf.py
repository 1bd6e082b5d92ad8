"""A Trainer of transformers that was stopped and runs again ends as one that never was."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import everstep
from everstep.checkpoint.errors import StateError, StateMismatchError
from everstep.integrations.hf import attach

STEPS = 12
"""Of two micro-batches of four samples: seven to an epoch of 50."""


def sample(index: int) -> dict[str, torch.Tensor]:
    text = torch.randint(0, 64, (16,), generator=torch.Generator().manual_seed(index))
    return {"input_ids": text, "labels": text.clone()}


class Samples(Dataset[Any]):
    """Random items: half the time the text is read backwards."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        found = sample(index)
        return {k: v.flip(0) for k, v in found.items()} if random.random() < 0.5 else found


class Stream(IterableDataset[Any]):
    """The same, of no length."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (Samples()[i] for i in range(200))


def masked(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch in which some of the text is noise."""
    text = torch.stack([s["input_ids"] for s in samples])
    noise = torch.where(torch.rand(text.shape) < 0.15, random.randrange(64), text)
    return {"input_ids": noise, "labels": text}


class Crash(Exception):
    """The end of a process, as far as a test in one can have it."""


class CrashAt(TrainerCallback):
    """Fails when an optimizer step is done, before it is saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Crash


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More than one only get into each other's way in a model of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_trainer(folder: Path, *, data: Any = None, crash_at: int = 0, **changes: Any) -> Trainer:
    torch.manual_seed(0)
    random.seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=16)
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "report_to": [],
        "disable_tqdm": True,
    }
    return Trainer(
        model=GPT2LMHeadModel(config),
        args=TrainingArguments(str(folder / "output"), **{**arguments, **changes}),
        train_dataset=data or Samples(),
        eval_dataset=Samples(),
        data_collator=masked,
        callbacks=[CrashAt(crash_at)],
    )


def run(folder: Path, trainer: Trainer, **options: Any) -> None:
    with everstep.Checkpointer(folder / "checkpoints", **options) as checkpointer:
        attach(trainer, checkpointer)
        trainer.train()


def assert_same_end(one: Trainer, other: Trainer) -> None:
    expected = one.model.state_dict()
    for name, value in other.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    keys = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm")
    logs = [[{k: e.get(k) for k in keys} for e in t.state.log_history] for t in (one, other)]
    assert logs[0] == logs[1]
    assert one.lr_scheduler.state_dict() == other.lr_scheduler.state_dict()
    assert one.state.total_flos == other.state.total_flos


@pytest.mark.parametrize(
    ("crash_at", "options", "data"),
    [
        (5, {"durable_every": 2}, Samples),  # in the middle of an epoch, between two logs
        (8, {}, Samples),  # when the first step of an epoch is done
        (9, {"durable_every": 3}, Stream),
    ],
)
def test_a_crashed_run_ends_as_one_that_did_not(
    crash_at: int, options: dict[str, int], data: Callable[[], Any], tmp_path: Path
) -> None:
    whole = make_trainer(tmp_path, data=data())
    run(tmp_path / "whole", whole, **options)
    with pytest.raises(Crash):
        run(tmp_path / "twice", make_trainer(tmp_path, data=data(), crash_at=crash_at), **options)
    resumed = make_trainer(tmp_path, data=data())
    run(tmp_path / "twice", resumed, **options)
    assert 0 < resumed._initial_global_step < crash_at
    assert_same_end(whole, resumed)


def test_another_number_of_samples_per_step_is_refused(tmp_path: Path) -> None:
    run(tmp_path, make_trainer(tmp_path, max_steps=1, eval_strategy="no"))
    with pytest.raises(StateMismatchError, match="steps have 8 samples, those of this run 12"):
        run(tmp_path, make_trainer(tmp_path, gradient_accumulation_steps=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ignore_data_skip": True}, "begin the epoch anew"),
        ({"auto_find_batch_size": True}, "would not be known; set it"),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "outlive an epoch"),
        (
            {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 4},
            "export the step of the best metric",
        ),
    ],
)
def test_what_cannot_be_resumed_exactly_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, **changes)
    with everstep.Checkpointer(tmp_path) as checkpointer, pytest.raises(StateError, match=message):
        attach(trainer, checkpointer)


def test_its_own_saving_is_switched_off_with_a_warning(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, save_strategy="steps")
    with (
        everstep.Checkpointer(tmp_path) as checkpointer,
        pytest.warns(UserWarning, match='save_strategy=.* set it to "no"'),
    ):
        attach(trainer, checkpointer)
    assert trainer.args.save_strategy == "no"


def test_where_to_continue_is_not_said_twice(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    with everstep.Checkpointer(tmp_path) as checkpointer:
        attach(trainer, checkpointer)
        with pytest.raises(StateError, match="leave the argument out"):
            trainer.train(resume_from_checkpoint="elsewhere")
