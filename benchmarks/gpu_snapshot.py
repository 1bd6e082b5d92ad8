"""What a snapshot at every step costs on a GPU: bandwidth, inflation of the step, DCP beside it.

    python benchmarks/gpu_snapshot.py [--billions 1.0] [--step-s 1.0] [--steps 12] [--json OUT]

A state of bf16 parameters with fp32 master copies and moments (14 bytes per parameter) is trained
by matrix products that take about ``--step-s`` per step. Turns alternate between steps without
snapshots, steps with one at each, and steps with one staged into pinned memory by
``torch.distributed.checkpoint``, where torch has that; neither writes anything to disk. Figures are
medians over the steps of all turns but the first. The link's peak is that of a plain copy of 1 GiB
to pinned memory.

Without a GPU it ends with exit code 2. It has not been run so far: no figures are published.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import nn

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.snapshots.arena import ArenaMemory
from everstep.checkpoint.torch_state import State

WIDTH = 8192
LINK_BYTES = 2**30


class MasterAdamW(torch.optim.Optimizer):
    """AdamW with fp32 master copies of bf16 parameters, all of it state of the parameters."""

    def __init__(self, parameters: Any, lr: float = 1e-4) -> None:
        super().__init__(parameters, {"lr": lr})
        for group in self.param_groups:
            for p in group["params"]:
                first, second = (torch.zeros_like(p, dtype=torch.float32) for _ in range(2))
                self.state[p] = {"master": p.detach().float(), "first": first, "second": second}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update."""
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            states = [self.state[p] for p in held]
            grads = [p.grad.float() for p in held]
            first, second = [s["first"] for s in states], [s["second"] for s in states]
            masters = [s["master"] for s in states]
            torch._foreach_lerp_(first, grads, 0.1)
            torch._foreach_mul_(second, 0.95)
            torch._foreach_addcmul_(second, grads, grads, 0.05)
            roots = torch._foreach_sqrt(second)
            torch._foreach_add_(roots, 1e-8)
            torch._foreach_addcdiv_(masters, first, roots, -group["lr"])
            torch._foreach_copy_(held, masters)


def state_of(parameters: float, device: str) -> State:
    """A model of about so many parameters, in square layers, and its optimizer."""
    layers = max(1, round(parameters / WIDTH**2))
    made = [nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16) for _ in range(layers)]
    model = nn.Sequential(*made).to(device)
    return State(model=model, optimizer=MasterAdamW(model.parameters()))


def link_bytes_per_s(device: str) -> float:
    """The best of five copies to pinned memory."""
    source = torch.empty(LINK_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty(LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        begun_s = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun_s)
    return LINK_BYTES / best


def train_step(state: State, batch: torch.Tensor, repeats: int) -> None:
    """Forward and backward so many times, then an update."""
    for _ in range(repeats):
        state.model(batch).float().square().mean().backward()
    for optimizer in state.optimizers:
        optimizer.step()
        optimizer.zero_grad()


def repeats_for(state: State, batch: torch.Tensor, step_s: float) -> int:
    """How many micro batches make a step of about so long."""
    train_step(state, batch, 1)
    torch.cuda.synchronize()
    begun_s = time.perf_counter()
    train_step(state, batch, 4)
    torch.cuda.synchronize()
    return max(1, round(step_s / ((time.perf_counter() - begun_s) / 4)))


def timed(
    state: State, batch: torch.Tensor, repeats: int, steps: int, save: Callable[[], None]
) -> tuple[list[float], list[float]]:
    """Seconds of each step, and of the host inside of each save."""
    whole_s, save_s = [], []
    for _ in range(steps):
        torch.cuda.synchronize()
        begun_s = time.perf_counter()
        train_step(state, batch, repeats)
        torch.cuda.synchronize()
        saving_s = time.perf_counter()
        save()
        save_s.append(time.perf_counter() - saving_s)
        whole_s.append(saving_s - begun_s + save_s[-1])
    return whole_s, save_s


def dcp_stager(state: State) -> Callable[[], None] | None:
    """DCP's asynchronous copy into pinned memory, which updates wait for; None: no such."""
    try:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    except ImportError:
        return None
    options = StagingOptions(
        use_pinned_memory=True,
        use_shared_memory=False,
        use_async_staging=True,
        use_non_blocking_copy=True,
    )
    stager = DefaultStager(options)
    optimizer = state.optimizers[0]
    pending: list[Any] = []

    def wait(*_: object) -> None:
        while pending:
            staged = pending.pop()
            if isinstance(staged, Future):
                staged.result()

    def save() -> None:
        wait()
        held = {"model": state.model.state_dict(), "optimizer": optimizer.state_dict()}
        pending.append(stager.stage(held))

    optimizer.register_step_pre_hook(wait)
    return save


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures."""
    device = "cuda"
    state = state_of(arguments.billions * 1e9, device)
    batch = torch.randn(1024, WIDTH, dtype=torch.bfloat16, device=device)
    repeats = repeats_for(state, batch, arguments.step_s)
    found: dict[str, list[float]] = {"plain": [], "snapshots": [], "dcp": [], "save_s": []}
    dcp_save = dcp_stager(state)
    number = 0
    with Checkpointer(folder / "steps", memory=ArenaMemory(), threads=4) as checkpointer:
        checkpointer.load(state)

        def save() -> None:
            nonlocal number
            checkpointer.save(number, state)
            number += 1

        for turn in range(arguments.turns + 1):
            plain, _ = timed(state, batch, repeats, arguments.steps, lambda: None)
            with_snapshots, save_s = timed(state, batch, repeats, arguments.steps, save)
            checkpointer.wait_captured()
            dcp = []
            if dcp_save is not None:
                dcp, _ = timed(state, batch, repeats, arguments.steps, dcp_save)
            if turn:  # the first one allocates
                found["plain"] += plain
                found["snapshots"] += with_snapshots
                found["dcp"] += dcp
                found["save_s"] += save_s
        report = checkpointer.report()
    medians = {name: statistics.median(seconds) for name, seconds in found.items() if seconds}
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "snapshot_bytes": report.snapshot_bytes,
        "taken": report.taken,
        "skipped": report.skipped,
        "link_bytes_per_s": link_bytes_per_s(device),
        "step_s": medians["plain"],
        "inflation": medians["snapshots"] / medians["plain"] - 1,
        "dcp_inflation": medians["dcp"] / medians["plain"] - 1 if "dcp" in medians else None,
        "save_s": medians["save_s"],
    }


def main() -> int:
    """Measure, print and write; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--billions", type=float, default=1.0, help="parameters")
    parser.add_argument("--step-s", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=12, help="of each kind, per turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device here: this benchmark needs one", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="everstep-gpu-") as folder:
        found = measure(arguments, Path(folder))
    text = json.dumps(found, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
