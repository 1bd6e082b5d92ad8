"""Snapshots of every step of a ``transformers.Trainer``, and resuming as if nothing had happened.

    trainer = Trainer(model=model, args=args, train_dataset=data)
    with everstep.Checkpointer("checkpoints", durable_every=100) as checkpointer:
        attach(trainer, checkpointer)
        trainer.train()

``train()`` continues after the newest step that there is: with its weights, optimizer, schedule,
counters, log, random numbers, and at the next sample. Works in one process and, with a
``ProcessGroupCollective``, under torchrun (DDP).
"""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.errors import StateError
from everstep.checkpoint.torch_rng import rng_states, set_rng_states
from everstep.checkpoint.torch_state import State
from everstep.integrations.hf_data import DataRandomness
from everstep.integrations.hf_record import TrainerRecord

_OWN_STEPS = ("_load_from_checkpoint", "_load_optimizer_and_scheduler", "_run_epoch")
"""Methods of a Trainer on which resuming rests; all there since transformers 5."""


def attach(trainer: Trainer, checkpointer: Checkpointer) -> None:
    """From now on ``trainer.train()`` saves every step, and begins by loading the newest.

    Args:
        trainer: of any class derived from ``transformers.Trainer``; its own saving is switched off.
        checkpointer: where to save; to be closed by the caller after training.

    Raises:
        StateError: the arguments of the trainer ask for what cannot be resumed exactly.
    """
    for wrong, why in _reasons(trainer).items():
        if why:
            raise StateError(f"a Trainer with {wrong} cannot be resumed exactly: {why}")
    if trainer.args.save_strategy != SaveStrategy.NO:
        warnings.warn(
            f"save_strategy={str(trainer.args.save_strategy)!r} is switched off: every step is "
            'saved already; set it to "no"',
            stacklevel=2,
        )
        trainer.args.save_strategy = SaveStrategy.NO
    kind = type(trainer)
    run = _Run(trainer, checkpointer)
    members = {"_everstep": run, "__module__": kind.__module__}
    trainer.__class__ = type(f"Resuming{kind.__name__}", (_ResumingTrainer, kind), members)
    trainer.add_callback(_Moments(run))


def _reasons(trainer: Trainer) -> dict[str, str]:
    """What a trainer may ask for -> why that cannot be resumed exactly; empty: it does not ask."""
    args = trainer.args
    found = {
        "load_best_model_at_end": "the best checkpoint of its own is not written; export the step "
        "of the best metric instead",
        "auto_find_batch_size": "the number of samples of a step would not be known; set it",
        "ignore_data_skip": "it would begin the epoch anew; leave it out",
        "dataloader_persistent_workers": "workers that outlive an epoch cannot be told that "
        "another one has begun; leave it out",
    }
    reasons = {name: why if getattr(args, name, False) else "" for name, why in found.items()}
    if trainer.is_deepspeed_enabled:
        reasons["DeepSpeed"] = "its optimizer keeps its state to itself; use DDP"
    if not all(hasattr(trainer, name) for name in _OWN_STEPS):
        reasons["this version of transformers"] = "its loop is another one; upgrade to 5 or newer"
    return reasons


class _Run:
    """One run of a trainer and its checkpoints."""

    def __init__(self, trainer: Trainer, checkpointer: Checkpointer) -> None:
        args = trainer.args
        self.data = DataRandomness(args.seed if args.data_seed is None else args.data_seed)
        self.record = TrainerRecord(trainer)
        self._trainer, self._checkpointer = trainer, checkpointer
        self._steps_saved = 0
        """All steps of the trainer before this one are saved or loaded; it counts from 1."""
        self._generators: dict[str, torch.Tensor] = {}
        self._state: State | None = None

    def begin(self, folder: Path) -> bool:
        """Whether there is a step to continue from; leaves the trainer's counters in a folder."""
        self._state = None
        only_record = State(model=self._model, trainer=self.record)
        self._steps_saved = self._checkpointer.load(only_record, include=["objects"])
        loaded = self._checkpointer.loaded
        if self._steps_saved == 0 or loaded is None:
            return False
        self.record.write_counters(folder, loaded.path)
        return True

    def load(self) -> None:
        """Load everything; the trainer has made and wrapped it all."""
        self._checkpointer.load(self._live(), self._steps_saved - 1)
        self.record.apply_schedule()
        self._generators = rng_states()

    def between_steps(self) -> None:
        """A step is over, with its log and evaluation; the next has not fetched its batches."""
        if self._generators:
            set_rng_states(self._generators)
            self._generators = {}
        self.save(durable=None)

    def save(self, *, durable: bool | None) -> None:
        """Save the newest step unless that was done."""
        done = self._trainer.state.global_step
        if done > self._steps_saved:
            handle = self._checkpointer.save(done - 1, self._live(), durable=durable)
            self._steps_saved = done
            if durable:
                handle.durable.result()

    def _live(self) -> State:
        """The state of the training that has begun."""
        if self._state is None:
            optimizer = self._trainer.optimizer
            if isinstance(optimizer, AcceleratedOptimizer):  # has no state and hooks of its own
                optimizer = optimizer.optimizer
            self._state = State(model=self._model, optimizer=optimizer, trainer=self.record)
        return self._state

    @property
    def _model(self) -> torch.nn.Module:
        model = self._trainer.model_wrapped
        assert isinstance(model, torch.nn.Module)
        return model


class _Moments(TrainerCallback):
    """Tells a run where the trainer is."""

    def __init__(self, run: _Run) -> None:
        self._run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._run.record.apply_sums()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._run.data.begin_epoch(int(state.epoch or 0))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._run.save(durable=True)


class _ResumingTrainer(Trainer):
    """Mixed into the class of a trainer: its own way to resume, from our checkpoints."""

    _everstep: _Run

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Continue after the newest step; as ``Trainer.train`` where there is none.

        Raises:
            StateError: a path to resume from is given, or a trial of a search.
            LoadFailedError: the newest step is damaged, or of something else.
        """
        if isinstance(resume_from_checkpoint, str) or trial is not None:
            raise StateError(
                "train() with a path to resume from, or with a trial: the checkpointer that is "
                "attached says where to continue; leave the argument out"
            )
        with tempfile.TemporaryDirectory(prefix="everstep-hf-") as folder:
            found = folder if self._everstep.begin(Path(folder)) else None
            return super().train(found, ignore_keys_for_eval=ignore_keys_for_eval)

    def get_train_dataloader(self) -> Any:
        """That of the trainer, with randomness that depends on the batch alone."""
        loader = super().get_train_dataloader()
        self._everstep.data.watch(loader)
        return loader

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of the next step; the first moment at which the one before is all over."""
        self._everstep.between_steps()
        with self._everstep.data.apart():
            return super().get_batch_samples(*args, **kwargs)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Nothing yet: model and optimizer are loaded together, once they are wrapped."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._everstep.load()

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing more: it was loaded with the rest."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: the generators are set before the first batch of a step is fetched."""
