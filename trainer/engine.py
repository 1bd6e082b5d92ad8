"""The torch engine of one rank: forward, backward, update, evaluation, on any mesh."""

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from everstep.checkpoint.torch_state import State
from everstep.trainer.architecture import ArchitectureNote
from everstep.trainer.config import RunConfig
from everstep.trainer.data import MicroBatch
from everstep.trainer.data.prefetch import BatchStream
from everstep.trainer.errors import ConfigError
from everstep.trainer.init import materialise
from everstep.trainer.loss import token_loss_sum
from everstep.trainer.mesh import build_mesh
from everstep.trainer.mesh_shape import MeshShape
from everstep.trainer.model import Llama, build_model, logits_of
from everstep.trainer.optim import build_optimizer, build_scheduler, clip_gradients
from everstep.trainer.parallelize import parallelize, set_gradient_sync
from everstep.trainer.pipeline import Pipeline
from everstep.trainer.sample import logits_at
from everstep.trainer.transfer import DeviceBatch, in_flight, transfer_to


class Engine(Protocol):
    """What the loop needs; another engine trains the same model with other machinery."""

    def forward_backward(self, batches: Sequence[MicroBatch]) -> Tensor:
        """Gradients of one step's micro batches; this rank's sum of token losses, fp64, 0-d.

        It is 0 on a rank of a pipeline that does not see the loss.
        """
        ...

    def apply_gradients(self) -> float:
        """Clip, update, clear; the global gradient norm before clipping.

        Where the norm is not a number, parameters and optimizer stay as they were.
        """
        ...

    def evaluate(self, batches: Iterable[MicroBatch]) -> Tensor:
        """This rank's (sum of token losses, tokens), fp64, shape (2,); both are 0 on a rank of a
        pipeline that does not see the loss."""
        ...

    def logits_at(self, tokens_1L: Tensor, position: int) -> Tensor:
        """Logits (V,) at one position of tokens (1, L), the same on every rank."""
        ...

    def state(self, data: BatchStream) -> State:
        """What a checkpoint of this run holds."""
        ...


class Passes(Protocol):
    """How batches go through the model; gradients are left in its parameters."""

    def forward_backward(self, batches: Sequence[MicroBatch]) -> Tensor:
        """See ``Engine``."""
        ...

    def evaluate(self, batches: Iterable[MicroBatch]) -> Tensor:
        """See ``Engine``."""
        ...

    def logits_at(self, tokens_1L: Tensor, position: int) -> Tensor:
        """See ``sample.LogitsAt``."""
        ...


class TorchEngine:
    """FSDP2, HSDP, tensor and pipeline parallelism; creating one is a collective call.

    Args:
        config: the run.
        shape: the resolved mesh.
        device: where this rank computes.
        vocab_size: the tokenizer's.
        document_end: the tokenizer's token for it, where attention stays inside of documents.
    """

    def __init__(
        self,
        config: RunConfig,
        shape: MeshShape,
        device: torch.device,
        vocab_size: int,
        document_end: int | None = None,
    ) -> None:
        self.device = device
        self.mesh = build_mesh(shape, device.type)
        model = build_model(
            config.model,
            vocab_size=vocab_size,
            seq_len=config.data.seq_len,
            seed=config.seed,
            document_end=document_end,
        )
        self._architecture = ArchitectureNote(config, vocab_size)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        """Of the whole model, tied ones once."""
        self.model: nn.Module = parallelize(model, self.mesh, shape, config.parallel)
        materialise(self.model, device, config.seed)
        self.optimizer = build_optimizer(self.model, config.optim)
        self._hyperparameters = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]
        self.scheduler = build_scheduler(self.optimizer, config.optim, config.train.steps)
        self._clip_norm = config.optim.clip_norm
        global_tokens = config.data.global_batch * config.data.seq_len
        loss_scale = shape.dp / global_tokens  # FSDP averages gradients over the dp ranks
        self._pipeline: Pipeline | None = None
        self._passes: Passes
        if isinstance(self.model, Llama) and self.model.stages:
            self._pipeline = Pipeline(config, self.model, self.mesh, shape, device, loss_scale)
            self._passes = self._pipeline
        else:
            self._passes = WholePasses(self.model, device, vocab_size, loss_scale)

    def follow_config(self) -> None:
        """After a load: learning rate and the like are the configuration's, changed or not.

        They are functions of configuration and step, so that without a change nothing changes.
        """
        factors = [f(self.scheduler.last_epoch) for f in self.scheduler.lr_lambdas]
        self.scheduler.base_lrs = [values["lr"] for values in self._hyperparameters]
        for group, values, factor in zip(
            self.optimizer.param_groups, self._hyperparameters, factors, strict=True
        ):
            group.update({**values, "lr": values["lr"] * factor, "initial_lr": values["lr"]})

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def forward_backward(self, batches: Sequence[MicroBatch]) -> Tensor:
        """See ``Engine``; gradients are reduced with the last micro batch only."""
        return self._passes.forward_backward(batches)

    def apply_gradients(self) -> float:
        """See ``Engine``."""
        pipeline = self._pipeline
        norm = clip_gradients(
            self.model.parameters(),
            self._clip_norm,
            pipeline=pipeline.group if pipeline else None,
            copies=pipeline.copies if pipeline else (),
        )
        if not math.isfinite(norm):
            return norm
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def evaluate(self, batches: Iterable[MicroBatch]) -> Tensor:
        """See ``Engine``."""
        return self._passes.evaluate(batches)

    def logits_at(self, tokens_1L: Tensor, position: int) -> Tensor:
        """See ``sample.LogitsAt``; every rank calls it."""
        return self._passes.logits_at(tokens_1L, position)

    def state(self, data: BatchStream) -> State:
        """See ``Engine``."""
        if self._pipeline is not None:
            self._pipeline.release()  # its stages are views, which the state does not see
        return State(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            data=data,
            architecture=self._architecture,
        )


class WholePasses:
    """Passes through a model that every rank has all layers of.

    Args:
        model: parallelised and materialised.
        device: where this rank computes.
        vocab_size: the tokenizer's.
        loss_scale: what the sum of token losses is multiplied with for the gradients.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, vocab_size: int, loss_scale: float
    ) -> None:
        self._model, self._device = model, device
        self._vocab_size, self._loss_scale = vocab_size, loss_scale
        self._transfer = transfer_to(device)
        self.logits_at = logits_at(model)

    def forward_backward(self, batches: Sequence[MicroBatch]) -> Tensor:
        """See ``Engine``; gradients are reduced with the last micro batch only."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for index, batch in enumerate(in_flight(batches, self._transfer)):
            set_gradient_sync(self._model, index == len(batches) - 1)
            loss_sum = self._loss_sum(batch)
            torch.autograd.backward(loss_sum * self._loss_scale)
            total += loss_sum.detach()
        return total

    def evaluate(self, batches: Iterable[MicroBatch]) -> Tensor:
        """See ``Engine``."""
        total = torch.zeros(2, dtype=torch.float64, device=self._device)
        self._model.eval()
        try:
            with torch.no_grad():
                for batch in in_flight(batches, self._transfer):
                    total[0] += self._loss_sum(batch)
                    total[1] += batch.targets_BL.numel()
        finally:
            self._model.train()
        return total

    def _loss_sum(self, batch: DeviceBatch) -> Tensor:
        logits_BLV = logits_of(self._model, batch.tokens_BL, batch.sample_B)
        shape, wanted = tuple(logits_BLV.shape), (*batch.tokens_BL.shape, self._vocab_size)
        if len(shape) != 3 or shape[:2] != wanted[:2] or shape[2] < wanted[2]:
            raise ConfigError(
                f"the model of model.factory returned shape {shape}, expected logits (batch, "
                f"sequence, vocabulary) of shape {wanted}: one row per token, at least"
            )
        return token_loss_sum(logits_BLV, batch.targets_BL)


def sum_over_ranks(values: Tensor, tp: int) -> list[float]:
    """Sums over all ranks but tensor-parallel ones, which hold the same values."""
    dist.all_reduce(values)
    return [value / tp for value in values.tolist()]
