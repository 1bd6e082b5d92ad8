"""Parts of the benchmarks that decide something; the rest is run by ``make bench``."""

import importlib.util
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

from everstep.trainer.config_load import load_config

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_gpu_benchmark_says_that_it_needs_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", ["gpu_train.py"])
    assert load("gpu_train").main() == 2
    assert "--device cpu --config debug_single" in capsys.readouterr().err


def test_the_gpu_benchmark_takes_few_micro_batches_and_leaves_warm_up_out() -> None:
    gpu_train = load("gpu_train")
    arguments = Namespace(warmup=2, steps=3, accumulate=4, device="cuda")
    changed = gpu_train.overrides_of(load_config("llama_1b", []), arguments, 2)
    assert "data.global_batch=32" in changed
    assert "train.steps=5" in changed
    lines = [
        {"loss": 1.0, "step_time_s": t, "tokens_per_s": 1 / t, "peak_memory_bytes": 100 + t}
        for t in (90.0, 80.0, 1.0, 2.0, 3.0)
    ]
    found = gpu_train.summarise(lines, arguments)
    assert found["step_time_s"][1] == 2.0
    assert found["first_step_s"] == 90.0
    assert found["peak_memory_bytes"] == 103
    assert "mfu" not in found


def test_a_variant_of_the_gpu_benchmark_that_takes_too_long_has_failed(tmp_path: Path) -> None:
    gpu_train = load("gpu_train")
    arguments = Namespace(config="debug_single", overrides=[], timeout_s=0.01)
    result = gpu_train.run_variant(arguments, [], tmp_path)
    assert result["error"] == ["not done after 0.01 s (--timeout-s)"]
    assert "failed (exit code None): not done after" in gpu_train.words("plain", result)


def test_ratios_of_the_data_benchmark_are_of_neighbouring_turns() -> None:
    quartiles = load("data_limits").ratio_quartiles([1.0, 20.0, 3.0], [2.0, 10.0, 3.0])
    assert quartiles == [0.5, 1.0, 2.0]
