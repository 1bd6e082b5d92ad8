"""How much longer a training step takes when the whole state is captured at every step.

    python benchmarks/snapshot_inflation.py [--quick] --json OUT [--plot PNG] [--dir DIR]

A Llama of 110M parameters (``--quick``: 20M) in fp32 trains under FSDP2 on two gloo ranks with one
thread each, meant for two cores, with AdamW (``foreach``, set by hand: torch's default on CPUs is
one tensor at a time; ``--adamw`` chooses). The ranks live as long as the benchmark, and the
training goes on from block to block of a few steps: one without snapshots, one with, one without,
and so on. The inflation of a block is its mean step time over that of its two neighbours without,
minus one. ``memory`` and ``copy_floor`` are done with a snapshot when the step after it ends: they
are compared step by step inside of their blocks, in periods of one step with a snapshot, two
without, one with. The inflation of a way is the median of its blocks or periods. Everstep's ways
and the floors have a block in every round, the peers take turns. Each block makes its way anew, and
its first steps do not count.

- ``memory``: ``everstep.Checkpointer`` captures the state into a keeper's memory (``--slots
  process``: into its own), with checksums and seals; ``durable``: at every step, and makes every
  fifth durable;
- ``copy_floor``: every byte copied once per step, by the main thread, into memory that was touched
  before: nothing that captures the state in memory can do with less;
- ``disk_floor``: the same, and every fifth step written past the page cache, paced, by a thread:
  what ``durable`` cannot do without;
- ``dcp_best``: ``torch.distributed.checkpoint.async_save`` with ``StagingOptions(False, False,
  True, False)`` in a thread, its staging awaited in an optimizer pre-step hook, plans cached;
  ``dcp_best_every_5``: at every fifth step; ``dcp_staging``: its copy alone, nothing written;
- ``dcp_default``: ``async_save`` as it comes; ``dcp_sync``: ``save``;
- ``torch_save``: ``torch.save`` of each rank's tensors into tmpfs;
- ``dlrover``: DLRover's Flash Checkpoint to memory, if it is installed.

What DCP writes goes to new files in ``--dir``, on a disk, and is synced, as DCP does it; a save
waits until the last one is written. Everything is deleted again.

CPU time is that of all threads of all ranks and of processes beside them, over the measured steps.
Of the main thread: the time in the call that asks for a snapshot, and in the hooks before the
update ("fence"). Memory is what the ranks' resident sets grow by at their peaks, with shared
memory outside of them and the private memory of processes beside them.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from checkpoint_io_files import file_system
from checkpoint_io_ranks import Ranks
from snapshot_inflation_dlrover import version, why_missing
from snapshot_inflation_report import (
    Block,
    goals,
    interval,
    plot,
    print_report,
    quartiles,
    summary,
    trials_of,
)
from snapshot_inflation_turns import (
    DLROVER,
    FULL,
    KEEPER,
    NONE,
    PLANS,
    PROCESS,
    QUICK,
    RANKS,
    TINY,
    ways_of_round,
)

from everstep.machine import read_cpu

TMPFS = Path("/dev/shm")


class Stage:
    """Runs blocks, one after the other."""

    def __init__(self, ranks: Ranks, disk: Path, memory: Path) -> None:
        self._ranks, self._disk, self._memory = ranks, disk, memory
        self._began_s = time.monotonic()
        self.blocks: list[Block] = []

    def take(self, way: str, round_number: int) -> None:
        """One block; leaves no file, and nothing for the disk to do later."""
        print(
            f"{time.monotonic() - self._began_s:5.0f} s  round {round_number}  {way}",
            file=sys.stderr,
            flush=True,
        )
        places = [folder / f"block-{len(self.blocks)}" for folder in (self._disk, self._memory)]
        for place in places:
            place.mkdir()
        found = self._ranks.call("block", way, *places)
        for place in places:
            shutil.rmtree(place)
        if way != NONE:
            os.sync()
        self.blocks.append(Block(way=way, round=round_number, ranks=found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="20M parameters, 2 rounds")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, help="blocks of each of our ways (7; 2 with --quick)")
    parser.add_argument("--ways", help=f"only these, by commas: {', '.join([*PLANS][1:])}")
    parser.add_argument("--adamw", choices=("foreach", "fused", "loop"), default="foreach")
    parser.add_argument("--slots", choices=(KEEPER, PROCESS), default=KEEPER, help="everstep's")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--plot", type=Path, help="where to write a picture (needs matplotlib)")
    parser.add_argument("--dir", type=Path, help="on the disk that is written to (the temporary)")
    arguments = parser.parse_args()
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib, or leave --plot out")
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error(f"--rounds: got {arguments.rounds}, expected at least 1")
    chosen = arguments.ways.split(",") if arguments.ways else [*PLANS][1:]
    if unknown := [way for way in chosen if way not in PLANS or way == NONE]:
        parser.error(f"--ways: {unknown[0]} is none of {', '.join([*PLANS][1:])}")
    missing = {way: "not asked for (--ways)" for way in PLANS if way not in (NONE, *chosen)}
    if DLROVER in chosen and (why := why_missing()):
        missing[DLROVER] = why
    size = TINY if arguments.tiny else QUICK if arguments.quick else FULL
    rounds = arguments.rounds or {TINY: 1, QUICK: 2, FULL: 7}[size]
    peers_per_round = 2 if size == FULL else len(PLANS)
    load_before = [round(load, 2) for load in os.getloadavg()]
    os.environ["OMP_NUM_THREADS"] = "1"
    began_s = time.monotonic()

    with (
        tempfile.TemporaryDirectory(prefix="everstep-bench-", dir=arguments.dir) as disk,
        tempfile.TemporaryDirectory(prefix="everstep-bench-", dir=TMPFS) as memory,
        Ranks(
            "snapshot_inflation_worker:Worker",
            RANKS,
            Path(disk),
            size,
            arguments.adamw,
            arguments.slots,
        ) as ranks,
    ):
        written_to = file_system(Path(disk))
        facts = ranks.call("facts")
        stage = Stage(ranks, Path(disk), Path(memory))
        for number in range(rounds):
            for way in ways_of_round(number, peers_per_round, missing):
                if not stage.blocks:
                    stage.take(NONE, number)
                stage.take(way, number)
                stage.take(NONE, number)

    state_bytes = sum(fact["state_bytes"] for fact in facts)
    ways = {way: summary(way, t, state_bytes) for way, t in trials_of(stage.blocks).items()}
    without = [block for block in stage.blocks if block.way == NONE]
    of_none = {
        "step_s_quartiles": quartiles([block.step_s for block in without]),
        "step_s_interval_95": interval([block.step_s for block in without]),
        "cpu_s_per_step": {
            f"rank {i}": statistics.median(
                statistics.mean(block.ranks[i]["cpu_s"]) for block in without
            )
            for i in range(RANKS)
        },
        "peak_bytes": [
            statistics.median(block.ranks[i]["peak_bytes"] for block in without)
            for i in range(RANKS)
        ],
    }
    shown = goals(ways)
    print_report(ways, of_none, shown)
    for way, why in missing.items():
        print(f"  {way} was not measured: {why}")
    cpu = read_cpu()
    if arguments.json:
        report = {
            "inflation": {way: found["inflation"] for way, found in ways.items()},
            "what": "step time with a snapshot at every step, over that without, minus one",
            "hardware": {
                "cpu": cpu.name,
                "cores": cpu.cores,
                "kernel": platform.release(),
                "file_system": written_to,
                "load_average_before": load_before,
            },
            "versions": {
                "python": platform.python_version(),
                "torch": metadata.version("torch"),
                "dlrover": version(),
            },
            "date": time.strftime("%Y-%m-%d"),
            "duration_s": time.monotonic() - began_s,
            "training": {
                **asdict(size),
                "parameters": facts[0]["parameters"],
                "tensors": facts[0]["tensors"],
                "state_bytes": state_bytes,
                "precision": "fp32",
                "optimizer": f"AdamW, {arguments.adamw}",
                "ranks": RANKS,
                "sharding": "FSDP2 over gloo",
                "threads_per_rank": 1,
            },
            "rounds": rounds,
            "slots": arguments.slots,
            "missing": missing,
            "goals": [{**asdict(goal), "met": goal.met} for goal in shown],
            "none": of_none,
            "ways": ways,
            "blocks": [asdict(block) for block in stage.blocks],
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.plot:
        step_s = of_none["step_s_quartiles"][1]
        title = (
            f"snapshots of {facts[0]['parameters'] / 1e6:.0f}M parameters "
            f"({state_bytes / 1e9:.2f} GB), step {step_s:.2f} s, {RANKS} ranks, {cpu.name}"
        )
        plot(ways, title, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
