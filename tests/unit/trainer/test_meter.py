"""Speed and memory of a step, in numbers and in words."""

import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from everstep.trainer.config_load import load_config
from everstep.trainer.flops import training_flops_per_token
from everstep.trainer.mesh_shape import MeshShape
from everstep.trainer.meter import StepMeter, multiplied_weights, peak_memory_bytes, step_meter
from everstep.trainer.model_shape import resolve_model
from everstep.trainer.summary import WIDTH, speed_words

CPU = torch.device("cpu")


def meter(peak_flops_per_s: float | None) -> StepMeter:
    return StepMeter(
        device=CPU, tokens_per_step=1000, flops_per_step=3e12, peak_flops_per_s=peak_flops_per_s
    )


def test_numbers_of_a_step() -> None:
    values = meter(8e12).measure(0.5)
    memory = values.pop("peak_memory_bytes")
    assert values == {"tokens_per_s": 2000, "tflops_per_s": 6.0, "mfu": 0.75}
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert isinstance(memory, int)
    assert 2**24 < memory <= used
    assert "mfu" not in meter(None).measure(0.5)


def test_the_typical_step_is_the_median_without_the_first() -> None:
    m = meter(None)
    assert m.typical() is None
    for index, time_s in enumerate([100.0, 0.5, 4.0, 1.0]):
        m.measure(time_s)
        if index == 0:
            assert (typical := m.typical()) is not None
            assert typical["tokens_per_s"] == 10
    typical = m.typical()
    assert typical is not None
    assert typical["tokens_per_s"] == 1000
    assert typical["tflops_per_s"] == 3.0


def test_a_device_does_its_share_of_the_step() -> None:
    config = load_config("debug_single", [])
    per_token = training_flops_per_token(resolve_model(config.model, 257), config.data.seq_len)
    made = step_meter(config, MeshShape(dp_shard=2, tp=2), CPU, 257, nn.Identity())
    assert made.tokens_per_step == 8 * 64
    assert made.flops_per_step == per_token * 8 * 64 / 4
    assert made.peak_flops_per_s is None


def test_weights_of_a_users_model() -> None:
    model = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4))
    assert multiplied_weights(model) == 24 + 24
    head = nn.Linear(4, 11, bias=False)
    head.weight = model[0].weight
    assert multiplied_weights(nn.Sequential(model, head)) == 24 + 24 + 44
    config = load_config("debug_single", ["model.factory=some.module:make"])
    made = step_meter(config, MeshShape(), CPU, 257, model)
    assert made.flops_per_step == 6 * 48 * 8 * 64


def test_memory_is_the_highest_so_far() -> None:
    size = peak_memory_bytes(CPU)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    missing = max(0, size - pages * resource.getpagesize())
    block = torch.ones(missing + 2**26, dtype=torch.uint8)  # just above the peak
    assert peak_memory_bytes(CPU) > size
    high = peak_memory_bytes(CPU)
    del block
    assert peak_memory_bytes(CPU) >= high


@pytest.mark.parametrize("share", [{}, {"mfu": 0.4215}])
def test_speed_in_words_fits_the_summary(share: dict[str, float]) -> None:
    values = {"tokens_per_s": 1.234e9, "tflops_per_s": 1234.5, "peak_memory_bytes": 1023.9 * 2**30}
    words = speed_words(values | share)
    assert words.startswith("1.23G tokens/s, 1.23P FLOP/s per device")
    assert ("42.1 % MFU" in words) == bool(share)
    assert len("  speed        " + words) <= WIDTH
