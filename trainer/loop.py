"""The training loop of one rank, top to bottom."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from everstep.trainer.config import RunConfig
from everstep.trainer.data import Corpus, held_out_batches
from everstep.trainer.data.prefetch import BatchStream
from everstep.trainer.engine import TorchEngine, sum_over_ranks
from everstep.trainer.errors import TrainingError
from everstep.trainer.mesh_shape import MeshShape
from everstep.trainer.meter import StepMeter
from everstep.trainer.metrics import MetricSink
from everstep.trainer.rank_spec import StopRequested
from everstep.trainer.saves import Saves, Say


@dataclass(kw_only=True)
class Run:
    """Everything that one rank trains with."""

    config: RunConfig
    shape: MeshShape
    dp_rank: int
    corpus: Corpus
    stream: BatchStream
    engine: TorchEngine
    saves: Saves
    meter: StepMeter
    sinks: Sequence[MetricSink]
    say: Say
    should_stop: StopRequested
    done_steps: int
    """Optimizer updates that the state has behind it."""
    first_loss: float = math.nan
    last_loss: float = math.nan
    trained_s: float = 0.0
    """Time in steps, without evaluations and saves."""
    eval_loss: float = math.nan


def train(run: Run) -> bool:
    """Train to the last step, or until asked to stop; the state is durable in both cases.

    Returns:
        True when all steps are done, False when it stopped on request.

    Raises:
        TrainingError: loss or gradient are no longer numbers; nothing of that step is saved.
        SaveFailedError: a checkpoint could not be written.
    """
    config, engine = run.config, run.engine
    tokens_per_step = config.data.global_batch * config.data.seq_len
    stop = False

    while run.done_steps < config.train.steps and not stop:
        began_s = time.perf_counter()
        step = run.done_steps + 1
        lr = engine.lr

        loss_sum = engine.forward_backward(run.stream.next_step())
        # One small reduction gives every rank the same loss and the same decision to stop.
        # (full, not tensor: it fills on a GPU, where a copy of the number would wait for it.)
        asked = torch.full((), float(run.should_stop()), dtype=torch.float64, device=engine.device)
        total, askers = sum_over_ranks(torch.stack([loss_sum, asked]), run.shape.tp)
        loss, stop = total / tokens_per_step, askers > 0
        if not math.isfinite(loss):
            raise TrainingError(step, "loss", loss, run.saves.settle())
        grad_norm = engine.apply_gradients()
        if not math.isfinite(grad_norm):
            raise TrainingError(step, "gradient norm", grad_norm, run.saves.settle())
        run.done_steps = step

        step_time_s = time.perf_counter() - began_s
        run.trained_s += step_time_s
        values = {
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": run.stream.position * config.data.seq_len,
            "step_time_s": step_time_s,
            **run.meter.measure(step_time_s),
        }
        last = step == config.train.steps
        if _due(step, config.train.eval_every) or (last and config.train.eval_batches):
            values["eval_loss"] = evaluate(run)
        for sink in run.sinks:
            sink.write(step, values)
        sealed = run.saves.report().newest_sealed
        run.say("step", step=step, steps=config.train.steps, sealed=sealed, **values)

        run.last_loss = loss
        if math.isnan(run.first_loss):
            run.first_loss = loss
        run.saves.after_step(step, lambda: engine.state(run.stream), final=last or stop)

    return run.done_steps >= config.train.steps


def evaluate(run: Run) -> float:
    """Mean token loss on the held-out split, the same on every rank."""
    config = run.config
    batches = held_out_batches(
        run.corpus, config.data, config.train.eval_batches, run.dp_rank, run.shape.dp
    )
    total, tokens = sum_over_ranks(run.engine.evaluate(batches), run.shape.tp)
    run.eval_loss = total / tokens
    run.say("eval", step=run.done_steps, loss=run.eval_loss)
    return run.eval_loss


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
