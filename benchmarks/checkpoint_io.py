"""How fast checkpoints are saved and loaded, beside the raw limits and what else people use.

    python benchmarks/checkpoint_io.py [--quick] --json OUT [--plot PNG] [--folder DIR]

About 300 float32 tensors, 2 GB (``--quick``: 0.27 GB), on four gloo ranks of this machine or on
one. Every way to save or load takes one turn per round; each round begins elsewhere in the list,
and every second goes through it backwards. The round before the first is not counted: it makes the
files, and checks every item that each way loads.

A save is durable when it is over (files and directory synced where the tool leaves that to its
user), and writes new files; what it replaces is deleted between turns. A load fills tensors that
are there already, from files in the page cache ("warm") or not ("cold": ``posix_fadvise``, and the
share that stayed is recorded). What is loaded was saved in four row shards, by tools that know only
whole tensors from one rank.

- ``raw O_DIRECT``: the same bytes from and to aligned memory, 16 MiB at a time, one file per rank;
- ``raw memcpy``: the same bytes from memory to memory; ``raw strided copy``: the same in the rows
  that resharding copies, by NumPy;
- ``everstep``: ``Checkpointer.save`` and ``load``; ``everstep, unchecked``: only the planned copies
  out of the mapped packs, without checksums;
- ``DCP``: torch.distributed.checkpoint as it comes; ``2 threads``: with two writing threads per
  rank and plans cached; ``safetensors``: its writer and reader of that format, which maps files;
- ``torch.save``: and ``torch.load(mmap=True)``; ``safetensors``: ``save_file`` and ``safe_open``;
- ``TensorStore zarr3``: uncompressed, one chunk per row shard, all tensors in flight at once.

Wall time is from the start of the first rank to the end of the last one, CPU time that of all
ranks with their threads and children. Work of the kernel's own threads (writing back what was
written through the page cache) is in nobody's CPU time. Syncs are calls of ``os.fsync`` and
``os.fdatasync``; those that TensorStore makes natively are not seen. Last: what planning one rank's
load of 30,000 tensors costs, from the bytes of the manifest of 64 ranks on, without any pack.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from checkpoint_io_files import drop, file_system, resident_share, takes_direct, warm
from checkpoint_io_ranks import Ranks
from checkpoint_io_report import (
    Samples,
    beside_strided,
    goals,
    plot,
    print_report,
    quartiles,
    rows_of,
)
from checkpoint_io_turns import (
    COLD,
    FULL,
    MEMCPY,
    OURS,
    QUICK,
    RANKS,
    SAVE,
    STRIDED,
    TINY,
    UNCHECKED,
    Turn,
    all_turns,
    in_round,
)

from everstep.machine import read_cpu

VERSIONS = ("torch", "numpy", "safetensors", "tensorstore")
PLAN_TENSORS = {FULL: 30_000, QUICK: 30_000, TINY: 30}


class Stage:
    """Runs turns; knows where each way has saved last."""

    def __init__(self, ranks: Ranks, folder: Path) -> None:
        self._ranks, self._folder = ranks, folder
        self._saved: dict[tuple[str, str], Path] = {}
        self.found = {turn: Samples() for turn in all_turns()}

    def take(self, turn: Turn, number: int) -> None:
        """One turn in a round; round 0 checks what is loaded, and does not count."""
        samples = Samples() if number == 0 else self.found[turn]
        path = self._save_path(turn, number) if turn.kind == SAVE else self._load_path(turn)
        if turn.kind != SAVE and turn.way not in (MEMCPY, STRIDED):
            (drop if turn.kind == COLD else warm)(path)
            samples.resident.append(resident_share(path))
        answers = self._ranks.call("turn", turn, path, number, number == 0)
        taken = [answer for answer in answers if answer is not None]
        ended_s, began_s = max(t["ended_s"] for t in taken), min(t["began_s"] for t in taken)
        samples.wall_s.append(ended_s - began_s)
        samples.cpu_s.append(sum(t["cpu_s"] for t in taken))
        samples.syncs.append(sum(t["syncs"] for t in taken))
        if turn.kind == SAVE:
            self._replace(turn, path)

    def _save_path(self, turn: Turn, number: int) -> Path:
        name = f"{turn.way}, {turn.layout}"
        return self._folder / (name if turn.way == OURS else f"{name}, {number}")

    def _load_path(self, turn: Turn) -> Path:
        way = OURS if turn.way == UNCHECKED else turn.way
        return self._saved.get((way, turn.source), self._folder)

    def _replace(self, turn: Turn, path: Path) -> None:
        """Delete what the way has saved before; leave nothing for the disk to do later."""
        before = self._saved.get((turn.way, turn.layout))
        if turn.way == OURS:
            self._ranks.call("forget", path)
        elif before is not None:
            shutil.rmtree(before)
        self._saved[turn.way, turn.layout] = path
        os.sync()


def progress(text: str, last: bool) -> None:
    """Where it is: rewritten in place on a terminal, else the ``last`` of each round."""
    if sys.stderr.isatty():
        print(f"\r{text:110}", end="\n" if last else "", file=sys.stderr, flush=True)
    elif last:
        print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="an eighth of the bytes, 3 rounds")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, help="turns of each way (5; 3 with --quick)")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--plot", type=Path, help="where to write a picture (needs matplotlib)")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (the temporary)")
    arguments = parser.parse_args()
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib, or leave --plot out")
    size = TINY if arguments.tiny else QUICK if arguments.quick else FULL
    rounds = arguments.rounds or {TINY: 1, QUICK: 3, FULL: 5}[size]
    load_before = [round(load, 2) for load in os.getloadavg()]
    began_s = time.monotonic()

    with tempfile.TemporaryDirectory(prefix="everstep-bench-", dir=arguments.folder) as name:
        folder = Path(name)
        disk = file_system(folder)
        if not takes_direct(folder):
            parser.error(f"{disk} takes no O_DIRECT: choose a folder on a disk with --folder")
        with Ranks("checkpoint_io_ways:Worker", RANKS, folder, size) as ranks:
            stage = Stage(ranks, folder)
            for number in range(rounds + 1):
                turns = in_round(all_turns(), max(0, number - 1), rounds)
                for at, turn in enumerate(all_turns() if number == 0 else turns):
                    progress(
                        f"{time.monotonic() - began_s:5.0f} s  round {number} of {rounds}, "
                        f"turn {at + 1} of {len(turns)}: {turn.group}: {turn.label}",
                        last=at + 1 == len(turns),
                    )
                    stage.take(turn, number)
            repeats = min(rounds, 3) if size == FULL else 1
            plans = [ranks.call("plan", PLAN_TENSORS[size])[0] for _ in range(repeats)]

    shown = goals(stage.found, [plan["total_s"] for plan in plans])
    print_report(stage.found, size.size_bytes, shown)
    print("\nplan, CPU s: " + ", ".join(f"{k} {v:.4g}" for k, v in plans[-1].items()))
    cpu = read_cpu()
    title = f"{size.size_bytes / 1e9:.2f} GB in {len(size.shapes())} tensors on {cpu.name}, {disk}"
    if arguments.json:
        report = {
            "what": "saving and loading checkpoints, beside raw limits and peers",
            "hardware": {
                "cpu": cpu.name,
                "cores": os.cpu_count(),
                "kernel": platform.release(),
                "file_system": disk,
                "load_average_before": load_before,
            },
            "versions": {
                "python": platform.python_version(),
                **{package: metadata.version(package) for package in VERSIONS},
            },
            "date": time.strftime("%Y-%m-%d"),
            "duration_s": time.monotonic() - began_s,
            "tensors": len(size.shapes()),
            "size_bytes": size.size_bytes,
            "ranks": RANKS,
            "rounds": rounds,
            "goals": [{**asdict(goal), "met": goal.met} for goal in shown],
            "beside_strided_copy": beside_strided(stage.found),
            "turns": rows_of(stage.found, size.size_bytes),
            "plan": {
                "tensors": PLAN_TENSORS[size],
                "cpu_s_quartiles": quartiles([plan["total_s"] for plan in plans]),
                "samples": plans,
            },
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.plot:
        plot(stage.found, title, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
