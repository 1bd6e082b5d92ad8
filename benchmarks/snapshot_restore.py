"""How fast a state comes back from the memory of a keeper.

    python benchmarks/snapshot_restore.py [--quick] [--json OUT]

One rank, a real keeper: a snapshot is captured into its memory and made durable, and is then loaded
into live tensors, checksums verified, again and again. Beside it, in turns, so that all see the
same load of the machine:

- ``memcpy``: as many bytes, from one place to another that both have their pages, in one thread;
- ``memory``: ``Checkpointer.load`` from the keeper;
- ``page_cache``: ``Checkpointer.load`` of the same step from files that were read just before.

Figures are medians of wall time and of CPU time of this process; the keeper does nothing meanwhile.
``fraction_of_memcpy`` is memcpy's wall time by that of its neighbours, over turns: the median, and
the quartiles.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.keeper import control
from everstep.checkpoint.keeper.client import KeeperMemory
from everstep.checkpoint.torch_state import State

MIB = 2**20
JOB = "benchmark"
TENSOR_MIB = 16
TIMES = dict[str, list[tuple[float, float]]]
"""Of each way, wall and CPU seconds of each turn."""


def new_state(size_mib: int) -> State:
    """As many bytes, in tensors of 16 MiB."""
    count = max(1, size_mib // TENSOR_MIB)
    tensors = (torch.rand(TENSOR_MIB * MIB // 4) for _ in range(count))
    return State(model=nn.ParameterList(tensors))


def measure(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall_s, time.process_time() - cpu_s


def run(folder: Path, size_mib: int, turns: int, threads: int) -> TIMES:
    """All ways in turns; the order changes from turn to turn."""
    place, root = folder / "place", folder / "checkpoints"
    control.start(JOB, place=place, budget_bytes=4 * size_mib * MIB + 64 * MIB)
    try:
        state = new_state(size_mib)
        expected = [parameter.detach().clone() for parameter in state.model.parameters()]
        memory = KeeperMemory(JOB, rank=0, world_size=1, place=place)
        source, target = (np.full(len(expected) * TENSOR_MIB * MIB, n, np.uint8) for n in (1, 2))
        with (
            Checkpointer(root, memory=memory, threads=threads) as held,
            Checkpointer(root, read_only=True, threads=threads) as stored,
        ):
            held.save(0, state, durable=True).durable.result(600)

            def load(checkpointer: Checkpointer, where: str) -> None:
                checkpointer.load(state)
                assert checkpointer.loaded is not None
                assert where in checkpointer.loaded.path, checkpointer.loaded.path

            ways: dict[str, Callable[[], object]] = {
                "memcpy": lambda: np.copyto(target, source),
                "memory": lambda: load(held, "the memory of keepers"),
                "page_cache": lambda: load(stored, str(root)),
            }
            for way in ways.values():
                way()  # pages, caches
            found: TIMES = {name: [] for name in ways}
            for turn in range(turns):
                names = list(ways) if turn % 2 else list(reversed(ways))
                for name in names:
                    found[name].append(measure(ways[name]))
            for parameter, was in zip(state.model.parameters(), expected, strict=True):
                assert torch.equal(parameter, was)
    finally:
        control.stop(JOB, place=place, now=True)
    return found


def summary(times: TIMES, n_bytes: int) -> dict[str, dict[str, Any]]:
    """Medians by way."""
    memcpy_s = [wall for wall, _ in times["memcpy"]]
    result = {}
    for name, values in times.items():
        walls, cpus = ([value[i] for value in values] for i in range(2))
        wall_s = statistics.median(walls)
        fractions = [copy / wall for copy, wall in zip(memcpy_s, walls, strict=True)]
        result[name] = {
            "wall_s": wall_s,
            "cpu_s": statistics.median(cpus),
            "bytes_per_s": n_bytes / wall_s,
            "fraction_of_memcpy": statistics.median(fractions),
            "fraction_quartiles": statistics.quantiles(fractions, method="inclusive")[::2],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="256 MiB instead of 2 GiB, 5 turns")
    parser.add_argument("--mib", type=int, help="size of the state in MiB")
    parser.add_argument("--turns", type=int, help="how often each way is measured")
    parser.add_argument("--threads", type=int, default=1, help="copy threads of a load")
    parser.add_argument("--json", type=Path, help="where to write the result")
    arguments = parser.parse_args()
    size_mib = arguments.mib or (256 if arguments.quick else 2048)
    size_mib = max(TENSOR_MIB, size_mib // TENSOR_MIB * TENSOR_MIB)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        turns = arguments.turns or (5 if arguments.quick else 15)
        times = run(Path(folder), size_mib, turns, arguments.threads)
    result = summary(times, size_mib * MIB)
    for name, figures in result.items():
        print(
            f"{name:10} {figures['wall_s']:.3f} s ({figures['cpu_s']:.3f} s of CPU), "
            f"{figures['bytes_per_s'] / 1e9:.2f} GB/s, "
            f"{figures['fraction_of_memcpy']:.0%} of memcpy "
            f"[{figures['fraction_quartiles'][0]:.0%}, {figures['fraction_quartiles'][1]:.0%}]"
        )
    if arguments.json:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
        report = {
            "what": "loading a snapshot from a keeper's memory, beside memcpy and the page cache",
            "hardware": {"cpu": cpu or platform.machine(), "cores": os.cpu_count()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "state_bytes": size_mib * MIB,
            "turns": turns,
            "threads": arguments.threads,
            "restore": result,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
