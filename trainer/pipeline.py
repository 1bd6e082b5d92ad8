"""Forward and backward passes through pipeline stages, with the schedules of torch.

Activations between stages are plain tensors: this rank's part of the sequence under tensor
parallelism, so that every (dp, tp) coordinate has a pipeline of its own. Tokens are not sent: every
rank of a pipeline reads the same ones.
"""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.distributed.tensor import DTensor

from everstep.trainer.config import RunConfig
from everstep.trainer.data import MicroBatch
from everstep.trainer.loss import token_loss_sum
from everstep.trainer.mesh_shape import MeshShape, plan_batches, settle_micro_batch
from everstep.trainer.model import Llama
from everstep.trainer.pipeline_plan import count_stages
from everstep.trainer.split_backward import WeightGradients
from everstep.trainer.stage import Stage
from everstep.trainer.transfer import in_flight, transfer_to


class Pipeline:
    """The stages of one rank, and how batches pass through them.

    Args:
        config: of the run.
        model: parallelised and materialised, with stages.
        mesh: of the run, of ``shape``.
        device: where this rank computes.
        loss_scale: what the sum of token losses is multiplied with for the gradients.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Llama,
        mesh: DeviceMesh,
        shape: MeshShape,
        device: torch.device,
        loss_scale: float,
    ) -> None:
        self._model, self._device, self._loss_scale = model, device, loss_scale
        self._transfer = transfer_to(device)
        self._stages = [stage for stage in model.stages if isinstance(stage, Stage)]
        self._n_stages = count_stages(config.parallel, shape.pp)
        self._group = mesh["pp"].get_group()
        self._rank, self._size = mesh["pp"].get_local_rank(), shape.pp
        self._tp = shape.tp
        bf16 = config.parallel.precision == "bf16"
        self._stream_dtype = torch.bfloat16 if bf16 else torch.float32
        batches = plan_batches(settle_micro_batch(config, shape).data, shape.dp)
        self._accumulation = batches.accumulation
        self._schedule = self._build_schedule(
            config.parallel.pipeline_schedule, batches.micro_batch, config.data.seq_len
        )
        self._total = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks of this pipeline, which hold different parameters."""
        return self._group

    @property
    def copies(self) -> list[Tensor]:
        """Parameters of this rank that are another rank's, too: a tied head is the embedding."""
        return [stage.lm_head.weight for stage in self._stages if stage.tied_head]

    def forward_backward(self, batches: Sequence[MicroBatch]) -> Tensor:
        """Gradients of one step; the sum of token losses, fp64, 0-d: zero but on the last stage."""
        if len(batches) != self._accumulation:
            raise ValueError(f"{len(batches)} micro-batches, the schedule has {self._accumulation}")
        whole = self._transfer.finish(self._transfer.start(_concatenated(batches)))
        self._total.zero_()
        self._schedule.step(
            *([whole.tokens_BL] if self._stages[0].span.first else []),
            target=whole.targets_BL if self._stages[-1].span.last else None,
            return_outputs=False,
            tokens_BL=whole.tokens_BL,
            sample_B=whole.sample_B,
        )
        if self._model.config.tie_embeddings:
            self._sum_tied_gradients()
        return self._total.clone()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> Tensor:
        """(Sum of token losses, tokens), fp64, shape (2,): zero but on the last stage."""
        total = torch.zeros(2, dtype=torch.float64, device=self._device)
        sent: list[dist.Work] = []
        self._model.eval()
        try:
            for batch in in_flight(batches, self._transfer):
                logits_BLV = self._forward(batch.tokens_BL, batch.sample_B, sent)
                while len(sent) > self._n_stages:  # what was sent keeps its memory until then
                    sent.pop(0).wait()
                if logits_BLV is not None:
                    total[0] += token_loss_sum(logits_BLV, batch.targets_BL)
                    total[1] += batch.targets_BL.numel()
            for work in sent:
                work.wait()
        finally:
            self._model.train()
        return total

    @torch.no_grad()
    def logits_at(self, tokens_1L: Tensor, position: int) -> Tensor:
        """Logits (V,) at one position of tokens (1, L), fp32; the same on every rank."""
        sent: list[dist.Work] = []
        self._model.eval()
        try:
            logits_1LV = self._forward(tokens_1L.to(self._device), None, sent)
        finally:
            self._model.train()
        logits_V = torch.empty(self._model.shape.vocab_size, device=self._device)
        if logits_1LV is not None:
            row_V = logits_1LV[0, position]
            logits_V.copy_(row_V.full_tensor() if isinstance(row_V, DTensor) else row_V)
        for work in sent:
            work.wait()
        dist.broadcast(logits_V, group=self._group, group_src=self._owner(self._n_stages - 1))
        return logits_V

    def release(self) -> None:
        """Free weights that a forward pass has left gathered; collective calls are not needed."""
        for stage in self._stages:
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def _build_schedule(
        self, name: str, micro_batch: int, seq_len: int
    ) -> Schedule1F1B | ScheduleInterleaved1F1B | ScheduleInterleavedZeroBubble:
        stages: list[Any] = [  # torch's types want a private base class
            self._pipeline_stage(stage, micro_batch, seq_len, deferred=name == "zero_bubble")
            for stage in self._stages
        ]
        if name == "1f1b":
            return Schedule1F1B(stages[0], self._accumulation, self._loss, scale_grads=False)
        kind = ScheduleInterleaved1F1B if name == "interleaved" else ScheduleInterleavedZeroBubble
        return kind(stages, self._accumulation, self._loss, scale_grads=False)

    def _pipeline_stage(
        self, stage: Stage, micro_batch: int, seq_len: int, *, deferred: bool
    ) -> PipelineStage:
        """Shapes and types are given, so that no stage has to run to find them out."""
        tokens = torch.empty((micro_batch, seq_len), dtype=torch.int64, device="meta")
        stream = torch.empty(
            (micro_batch, seq_len // self._tp, self._model.shape.dim),
            dtype=self._stream_dtype,
            device="meta",
            requires_grad=True,
        )
        return PipelineStage(
            stage,
            stage.span.index,
            self._n_stages,
            self._device,
            input_args=tokens if stage.span.first else stream,
            output_args=stream,  # of the last stage, nobody looks at it
            group=self._group,
            dw_builder=WeightGradients(stage).take if deferred else None,
        )

    def _loss(self, logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
        """The scaled loss of one micro-batch; adds to the sum of the step."""
        loss_sum = token_loss_sum(logits_BLV, targets_BL)
        self._total += loss_sum.detach()
        return loss_sum * self._loss_scale

    def _forward(
        self, tokens_BL: Tensor, sample_B: Tensor | None, sent: list[dist.Work]
    ) -> Tensor | None:
        """One batch through all stages; logits on the last stage, None elsewhere.

        What was sent is to be waited for after all batches: with one stage per rank, the next batch
        enters while this one is further on. Ranks send and receive in the order of the stages, so
        that nobody waits for a message that comes later.
        """
        samples, length = tokens_BL.shape
        x = tokens_BL
        for stage in self._stages:
            index = stage.span.index
            if not stage.span.first:
                x = torch.empty(
                    (samples, length // self._tp, self._model.shape.dim),
                    dtype=self._stream_dtype,
                    device=self._device,
                )
                dist.recv(x, group=self._group, group_src=self._owner(index - 1))
            x = stage(x, tokens_BL, sample_B)
            if stage.span.last:
                break
            work = dist.isend(x, group=self._group, group_dst=self._owner(index + 1))
            if work is not None:
                sent.append(work)
        return x if self._stages[-1].span.last else None

    def _sum_tied_gradients(self) -> None:
        """Give embedding and tied head, which are one parameter, the sum of their gradients."""
        first, last = self._stages[0], self._stages[-1]
        if first.span.first:
            weight, peer = first.embed_tokens.weight, self._owner(self._n_stages - 1)
        elif last.tied_head:
            weight, peer = last.lm_head.weight, self._owner(0)
        else:
            return
        assert weight.grad is not None
        gradient = weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad
        other = torch.empty_like(gradient)
        exchange = [
            dist.P2POp(dist.isend, gradient, group=self._group, group_peer=peer),
            dist.P2POp(dist.irecv, other, group=self._group, group_peer=peer),
        ]
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
        gradient += other

    def _owner(self, stage: int) -> int:
        """Which rank of the pipeline runs a stage."""
        return stage % self._size


def _concatenated(batches: Sequence[MicroBatch]) -> MicroBatch:
    """All samples of micro-batches as one."""
    return MicroBatch(
        **{
            field.name: np.concatenate([getattr(batch, field.name) for batch in batches])
            for field in fields(MicroBatch)
        }
    )
