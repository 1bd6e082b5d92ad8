"""Speed and memory of a rank, step by step."""

import resource
import statistics
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import nn

from everstep.trainer.config import RunConfig
from everstep.trainer.flops import TERA, peak_flops_per_s, training_flops_per_token
from everstep.trainer.mesh_shape import MeshShape
from everstep.trainer.model_shape import resolve_model

REMEMBERED_STEPS = 1000


@dataclass(kw_only=True)
class StepMeter:
    """What a step achieved on the device of this rank."""

    device: torch.device
    tokens_per_step: int
    """Of all ranks."""
    flops_per_step: float
    """Model FLOPs of one device's share (see ``flops.py``)."""
    peak_flops_per_s: float | None
    """What the device could do at most; None: not known."""
    _times_s: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED_STEPS))

    def measure(self, step_time_s: float) -> dict[str, float]:
        """The numbers of a step that took so long.

        ``tokens_per_s`` of all ranks; ``tflops_per_s`` of model FLOPs per device; ``mfu``, its
        fraction of the device's peak, where that is known; ``peak_memory_bytes`` of this rank.
        """
        self._times_s.append(step_time_s)
        return {**self._speed(step_time_s), "peak_memory_bytes": peak_memory_bytes(self.device)}

    def typical(self) -> dict[str, float] | None:
        """``measure`` of the median of the last steps; None before the first.

        The first step of a run, which warms up, compiles and allocates, is left out of it.
        """
        times_s = list(self._times_s)[1:] or list(self._times_s)
        if not times_s:
            return None
        speed = self._speed(statistics.median(times_s))
        return {**speed, "peak_memory_bytes": peak_memory_bytes(self.device)}

    def _speed(self, step_time_s: float) -> dict[str, float]:
        flops_per_s = self.flops_per_step / step_time_s
        values = {
            "tokens_per_s": self.tokens_per_step / step_time_s,
            "tflops_per_s": flops_per_s / TERA,
        }
        if self.peak_flops_per_s is not None:
            values["mfu"] = flops_per_s / self.peak_flops_per_s
        return values


def step_meter(
    config: RunConfig, shape: MeshShape, device: torch.device, vocab_size: int, model: nn.Module
) -> StepMeter:
    """The meter of a run; ``model`` is looked at only where ``model.factory`` made it.

    Of such a model, attention is not known and not counted.
    """
    if config.model.factory is None:
        size = resolve_model(config.model, vocab_size)
        flops_per_token = training_flops_per_token(size, config.data.seq_len)
    else:
        flops_per_token = 6.0 * multiplied_weights(model)
    tokens_per_step = config.data.global_batch * config.data.seq_len
    peak = None
    if device.type == "cuda":
        parallel = config.parallel
        name = torch.cuda.get_device_name(device)
        peak = peak_flops_per_s(name, parallel.precision, parallel.matmul_precision)
    return StepMeter(
        device=device,
        tokens_per_step=tokens_per_step,
        flops_per_step=flops_per_token * tokens_per_step / shape.world_size,
        peak_flops_per_s=peak,
    )


def multiplied_weights(model: nn.Module) -> int:
    """Weights in matrices that a token is multiplied with, whatever their sharding.

    Tables that are only looked up in do not count; one that is the head as well does, once.
    """
    used = {
        parameter
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    return sum(parameter.numel() for parameter in used if parameter.dim() >= 2)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that tensors on a GPU, or this process on the CPU, ever took so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
