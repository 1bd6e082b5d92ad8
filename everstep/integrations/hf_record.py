"""What a Trainer of transformers knows beside model and optimizer, as an object of a State."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import Trainer
from transformers.trainer_callback import ExportableState, TrainerState

from everstep.checkpoint.errors import StateMismatchError

_SUMMARY = "train_runtime"
"""Member of the entry that a Trainer logs when it ends, which is not of any step."""


class TrainerRecord:
    """Counters, log, learning-rate schedule, loss scale and running sums of a Trainer.

    A Trainer takes these over at three moments, so ``load_state_dict`` only keeps them; see the
    methods that apply them.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._log = _Log()
        self._mesh: DeviceMesh | None = None
        self._loaded: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Plain values, and a tensor of what differs between ranks."""
        trainer = self._trainer
        state = trainer.state
        plain = {f.name: getattr(state, f.name) for f in fields(state) if f.name != "log_history"}
        callbacks: list[Any] = [*trainer.callback_handler.callbacks, trainer.control]
        exported: list[Any] = [c for c in callbacks if isinstance(c, ExportableState)]
        plain["stateful_callbacks"] = TrainerState(stateful_callbacks=exported).stateful_callbacks
        scheduler, scaler = trainer.lr_scheduler, trainer.accelerator.scaler
        return {
            "state": plain,
            "log": self._log.after([e for e in state.log_history if _SUMMARY not in e]),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "samples_per_step": self._samples_per_step(),
            "last_logged": getattr(trainer, "_globalstep_last_logged", 0),
            "sums": self._sums(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what was loaded."""
        self._loaded = state_dict

    def write_counters(self, folder: Path, where: str) -> None:
        """Write what was loaded as the file from which a Trainer takes its counters.

        Raises:
            StateMismatchError: the steps of this run have another number of samples, so that there
                is no position in its data that is that of the checkpoint.
        """
        saved, here = self._loaded["samples_per_step"], self._samples_per_step()
        if saved != here:
            raise StateMismatchError(
                where,
                [
                    f"its steps have {saved} samples, those of this run {here} (batch size x "
                    "accumulation x ranks)"
                ],
            )
        entries = [json.loads(line) for line in self._loaded["log"].splitlines()]
        counters = {**self._loaded["state"], "log_history": entries}
        (folder / "trainer_state.json").write_text(json.dumps(counters), encoding="utf-8")

    def apply_schedule(self) -> None:
        """Give schedule and loss scale to the Trainer, which must have made them."""
        for name, value in (
            ("scheduler", self._trainer.lr_scheduler),
            ("scaler", self._trainer.accelerator.scaler),
        ):
            if value is not None and self._loaded[name] is not None:
                value.load_state_dict(self._loaded[name])

    def apply_sums(self) -> None:
        """Give the running sums to the Trainer, which must have reset them."""
        if not self._loaded:
            return
        trainer, sums = self._trainer, self._loaded["sums"]
        # of another number of ranks: what they had on average
        mine = sums.to_local()[0] if isinstance(sums, DTensor) else sums.mean(0)
        trainer._tr_loss = mine[0].to(trainer._tr_loss)
        trainer.current_flos = int(mine[1])
        trainer._globalstep_last_logged = self._loaded["last_logged"]

    def _samples_per_step(self) -> int:
        return int(self._trainer.get_total_train_batch_size(self._trainer.args))

    def _sums(self) -> torch.Tensor:
        """Loss since the last log and operations, by rank. Shape: (world_size, 2), float64."""
        trainer, args = self._trainer, self._trainer.args
        loss = getattr(trainer, "_tr_loss", None)
        mine = torch.zeros(1, 2, dtype=torch.float64, device=args.device)
        if loss is not None:
            mine[0, 0] = loss
        mine[0, 1] = float(trainer.current_flos)
        if args.world_size == 1:
            return mine
        if self._mesh is None:
            self._mesh = init_device_mesh(args.device.type, (args.world_size,))
        return DTensor.from_local(mine, self._mesh, [Shard(0)], run_check=False)


class _Log:
    """The log as text that a step appends to, however long the run was; a line of JSON each."""

    def __init__(self) -> None:
        self._text, self._entries = "", 0

    def after(self, entries: list[dict[str, float]]) -> str:
        """The log that has these entries, of which the first may be in it already."""
        if len(entries) < self._entries:
            self._text, self._entries = "", 0
        new = entries[self._entries :]
        self._text += "".join(json.dumps(entry, default=_plain) + "\n" for entry in new)
        self._entries = len(entries)
        return self._text


def _plain(value: Any) -> float | str:
    """What stands in the log for a value that JSON does not know."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)
