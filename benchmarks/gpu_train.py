"""Tokens/s, MFU and peak memory of a config on this host's GPUs, as the command line trains it.

    python benchmarks/gpu_train.py [--config llama_1b] [--steps 12] [--json OUT] [key=value ...]

Every variant (blocks compiled or not, activations recomputed or not) is a run of its own through
``everstep train``, with ``--accumulate`` micro batches per update and nothing saved but the end;
figures are medians and quartiles of its ``metrics.jsonl``, without the first ``--warmup`` steps.
MFU is of model FLOPs: recomputation does not count, attention counts in full (trainer/flops.py).
A variant that fails, for lack of memory say, is recorded with its error.

``--device cpu`` tries the benchmark itself where there is no GPU, with a config that is small
enough, such as ``debug_single``. Without a GPU it ends with exit code 2 otherwise.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from everstep import machine
from everstep.trainer.config import AUTO, RunConfig
from everstep.trainer.config_load import load_config
from everstep.trainer.mesh_shape import resolve_mesh, world_size_of

VARIANTS = {
    "plain": (False, False),
    "compile": (True, False),
    "checkpointing": (False, True),
    "compile+checkpointing": (True, True),
}
"""Name -> (parallel.compile, parallel.activation_checkpointing)."""
FIGURES = ("step_time_s", "tokens_per_s", "tflops_per_s", "mfu")


def overrides_of(config: RunConfig, arguments: argparse.Namespace, world_size: int) -> list[str]:
    """What is changed in the config so that a few steps of it can be measured."""
    steps = arguments.warmup + arguments.steps
    changed = [
        f"train.steps={steps}",
        "train.eval_every=0",
        "train.eval_batches=0",
        "train.sample_tokens=0",
        "checkpoint.every_steps=0",
        f"optim.warmup_steps={min(config.optim.warmup_steps, steps)}",
        f"parallel.device={arguments.device}",
        "metrics.sinks=[jsonl]",
    ]
    if config.data.micro_batch != AUTO:
        dp = resolve_mesh(config.mesh, world_size).dp
        changed.append(f"data.global_batch={config.data.micro_batch * dp * arguments.accumulate}")
    return changed


def run_variant(arguments: argparse.Namespace, changed: list[str], folder: Path) -> dict[str, Any]:
    """Train in a process of its own; its figures, or its error."""
    command = [sys.executable, "-m", "everstep", "train", arguments.config]
    try:
        done = subprocess.run(
            [*command, "--run-dir", str(folder / "run"), *arguments.overrides, *changed],
            capture_output=True,
            text=True,
            timeout=arguments.timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return {"failed": None, "error": [f"not done after {error.timeout:g} s (--timeout-s)"]}
    metrics = folder / "run" / "metrics.jsonl"
    if done.returncode != 0 or not metrics.exists():
        said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        return {"failed": done.returncode, "error": said[-20:]}
    return summarise([json.loads(line) for line in metrics.read_text().splitlines()], arguments)


def summarise(lines: list[dict[str, float]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Quartiles of the steps after the warm-up (pure)."""
    measured = lines[arguments.warmup :]
    result: dict[str, Any] = {
        name: statistics.quantiles([line[name] for line in measured], n=4)
        for name in FIGURES
        if name in measured[0]
    }
    result["peak_memory_bytes"] = measured[-1]["peak_memory_bytes"]
    result["first_step_s"] = lines[0]["step_time_s"]
    result["losses"] = [line["loss"] for line in lines]
    return result


def words(name: str, result: dict[str, Any]) -> str:
    """One line about a variant."""
    if "failed" in result:
        return f"{name:22} failed (exit code {result['failed']}): {' '.join(result['error'][-1:])}"
    low, middle, high = result["step_time_s"]
    mfu = f"{100 * result['mfu'][1]:.1f} % MFU, " if "mfu" in result else ""
    return (
        f"{name:22} {result['tokens_per_s'][1]:,.0f} tokens/s, {result['tflops_per_s'][1]:.4g} "
        f"TFLOP/s per device, {mfu}step {middle:.4f} s [{low:.4f}, {high:.4f}], peak "
        f"{result['peak_memory_bytes'] / 2**30:.2f} GiB"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("overrides", nargs="*", help="key=value, as for everstep train")
    parser.add_argument("--config", default="llama_1b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=12, help="measured steps, at least 2")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--accumulate", type=int, default=4, help="micro batches per update")
    parser.add_argument("--timeout-s", type=float, default=1800.0, help="of each variant")
    parser.add_argument("--json", type=Path, help="where to write the result")
    arguments = parser.parse_intermixed_args()
    if arguments.steps < 2:
        parser.error(f"--steps: got {arguments.steps}, expected at least 2: figures are quartiles")

    gpus = machine.count_gpus()
    if arguments.device == "cuda" and not gpus:
        print(
            "error: this host has no GPU that CUDA can see: run the benchmark where there is one, "
            "or try it with --device cpu --config debug_single",
            file=sys.stderr,
        )
        return 2
    config = load_config(arguments.config, arguments.overrides)
    world_size = world_size_of(config.mesh, None, gpus if arguments.device == "cuda" else 0)
    changed = overrides_of(config, arguments, world_size)
    results = {}
    for name in arguments.variants:
        compiled, recomputed = VARIANTS[name]
        parallel = [
            f"parallel.compile={str(compiled).lower()}",
            f"parallel.activation_checkpointing={str(recomputed).lower()}",
        ]
        with tempfile.TemporaryDirectory(prefix="everstep-bench-") as folder:
            results[name] = run_variant(arguments, [*changed, *parallel], Path(folder))
        print(words(name, results[name]), flush=True)
    if arguments.json:
        known = [gpu.name for gpu in machine.read_gpus()] if arguments.device == "cuda" else []
        cpu = machine.read_cpu()
        report = {
            "what": "training speed and memory of a config, by variant: quartiles over steps",
            "hardware": {"gpus": known, "cpu": cpu.name, "cores": os.cpu_count()},
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
            },
            "config": arguments.config,
            "overrides": [*arguments.overrides, *changed],
            "ranks": world_size,
            "warmup_steps": arguments.warmup,
            "variants": results,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if all("failed" in result for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
