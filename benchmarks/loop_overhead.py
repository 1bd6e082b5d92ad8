"""What everstep's loop costs beside a hand-written PyTorch loop of the same model.

    python benchmarks/loop_overhead.py [--blocks 40] [--steps 1] [--json OUT]

Both loops live in the same processes and take turns, step by step (A B B A ...), so that both see
the same load of the machine. Ours is ``trainer.loop.train`` as the command line runs it: data
stream, loss reduction, clipping, schedule, metrics.jsonl, one report per step down a pipe that
another process reads; only saving is left out. The hand-written one does what people write:
batches from a token array, ``cross_entropy``, ``clip_grad_norm_``, fused AdamW, a scheduler, the
mean loss of all ranks printed to a file. Figures are per step: wall time of rank 0 and CPU time
of all ranks: the median over blocks, the fastest decile (what the machine's noise adds is never
negative), and the ratio ours / hand-written of neighbouring blocks with its quartiles.

What a loop adds to a step does not depend on the width of the model. So the same is measured with a
model of as many tensors that is too narrow to cost anything: the difference per step, in
milliseconds and as a share of a step of 0.5 s, is above the noise there.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from everstep.checkpoint.snapshots.report import SnapshotReport
from everstep.trainer.config import RunConfig
from everstep.trainer.config_load import load_config
from everstep.trainer.data import TrainStream, open_corpus
from everstep.trainer.data.prefetch import PrefetchedStream
from everstep.trainer.engine import TorchEngine
from everstep.trainer.init import materialise
from everstep.trainer.loop import Run, train
from everstep.trainer.mesh import build_mesh
from everstep.trainer.mesh_shape import resolve_mesh
from everstep.trainer.meter import step_meter
from everstep.trainer.metrics import JsonlSink
from everstep.trainer.model import build_model
from everstep.trainer.parallelize import parallelize

TINY = ["model.dim=32", "model.heads=4", "data.seq_len=32"]
OVERRIDES = [
    "model.dim=320",
    "model.layers=5",
    "data.global_batch=8",
    "train.eval_every=0",
    "train.eval_batches=0",
]
MESHES = {1: ["mesh.tp=1", "mesh.dp_shard=1"], 2: ["mesh.tp=1", "mesh.dp_shard=2"]}


class NothingSaved:
    """Stands in for the saves of a run: they are measured elsewhere."""

    def report(self) -> SnapshotReport:
        """There are none."""
        return SnapshotReport()

    def after_step(self, step: int, state: object, *, final: bool) -> None:
        """Do nothing."""


def our_loop(config: RunConfig, folder: Path, rank: int, pipe: int) -> Callable[[int], float]:
    """A function that trains n more steps and returns the last loss."""
    shape = resolve_mesh(config.mesh, dist.get_world_size())
    corpus = open_corpus(config.data, folder / "cache")
    engine = TorchEngine(config, shape, torch.device("cpu"), corpus.vocab_size)

    def say(kind: str, **facts: Any) -> None:
        if rank == 0:
            os.write(pipe, (json.dumps({"kind": kind, "rank": rank, **facts}) + "\n").encode())

    run = Run(
        config=config,
        shape=shape,
        dp_rank=rank,
        corpus=corpus,
        stream=PrefetchedStream(
            TrainStream(corpus, config.data, config.seed, rank, shape.dp), config.data.prefetch
        ),
        engine=engine,
        saves=NothingSaved(),  # type: ignore[arg-type]
        meter=step_meter(config, shape, engine.device, corpus.vocab_size, engine.model),
        sinks=[JsonlSink(folder / "metrics.jsonl", 0)] if rank == 0 else [],
        say=say,
        should_stop=lambda: False,
        done_steps=0,
    )

    def steps(n: int) -> float:
        sections = config.train.model_copy(update={"steps": run.done_steps + n})
        run.config = config.model_copy(update={"train": sections})
        train(run)
        return run.last_loss

    return steps


def hand_written_loop(config: RunConfig, folder: Path, rank: int) -> Callable[[int], float]:
    """The same, as one would write it without everstep."""
    shape = resolve_mesh(config.mesh, dist.get_world_size())
    corpus = open_corpus(config.data, folder / "cache")
    model = build_model(
        config.model,
        vocab_size=corpus.vocab_size,
        seq_len=config.data.seq_len,
        seed=config.seed,
    )
    parallelize(model, build_mesh(shape, "cpu"), shape, config.parallel)
    materialise(model, torch.device("cpu"), config.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.optim.lr, betas=config.optim.betas, fused=True
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10_000)
    tokens = torch.from_numpy(corpus.tokens_train[: 2**22].astype("int64"))
    seq_len, batch = config.data.seq_len, config.data.global_batch // shape.dp
    generator = torch.Generator().manual_seed(rank)
    log = (folder / f"by_hand-{rank}.txt").open("w")

    def steps(n: int) -> float:
        loss_value = math.nan
        for _ in range(n):
            starts = torch.randint(len(tokens) - seq_len - 1, (batch,), generator=generator)
            x = torch.stack([tokens[s : s + seq_len] for s in starts.tolist()])
            y = torch.stack([tokens[s + 1 : s + seq_len + 1] for s in starts.tolist()])
            logits = model(x)
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            mean = loss.detach()
            dist.all_reduce(mean)
            loss_value = mean.item() / dist.get_world_size()
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            print(f"loss {loss_value} norm {norm.item()}", file=log, flush=True)
        return loss_value

    return steps


def measure(
    rank: int, ranks: int, arguments: argparse.Namespace, folder: Path, tiny: bool
) -> dict[str, Any]:
    """One process: alternate the two loops; per-block wall and CPU seconds per step."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous{ranks}", rank=rank, world_size=ranks
    )
    config = load_config("demo", [*OVERRIDES, *MESHES[ranks], *(TINY if tiny else [])])
    read_end, write_end = os.pipe()
    reader = os.fork()
    if reader == 0:  # reads reports as a controller would
        os.close(write_end)
        while os.read(read_end, 65536):
            pass
        os._exit(0)
    os.close(read_end)
    if rank == 0:
        open_corpus(config.data, folder / "cache")
    dist.barrier()
    loops = {
        "everstep": our_loop(config, folder, rank, write_end),
        "by hand": hand_written_loop(config, folder, rank),
    }
    result: dict[str, Any] = {name: {"wall_s": [], "cpu_s": []} for name in loops}
    for loop in loops.values():
        loop(2)
    for block in range(arguments.blocks * (10 if tiny else 1)):
        order = list(loops) if block % 2 == 0 else list(loops)[::-1]
        for name in order:
            dist.barrier()
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            loops[name](arguments.steps)
            result[name]["wall_s"].append((time.perf_counter() - wall_s) / arguments.steps)
            result[name]["cpu_s"].append((time.process_time() - cpu_s) / arguments.steps)
    os.close(write_end)
    os.waitpid(reader, 0)
    dist.destroy_process_group()
    return result


def in_process(queue: Any, rank: int, ranks: int, arguments: Any, folder: Path, tiny: bool) -> None:
    """Entry of a child process."""
    queue.put((rank, measure(rank, ranks, arguments, folder, tiny)))


def run_ranks(
    ranks: int, arguments: argparse.Namespace, folder: Path, tiny: bool
) -> dict[str, Any]:
    """Measure with this many ranks and summarise."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    children = [
        context.Process(target=in_process, args=(queue, rank, ranks, arguments, folder, tiny))
        for rank in range(ranks)
    ]
    for child in children:
        child.start()
    results = dict(queue.get(timeout=3600) for _ in children)
    for child in children:
        child.join()

    summary: dict[str, Any] = {}
    for figure in ("wall_s", "cpu_s"):
        series = {
            name: (
                results[0][name][figure]
                if figure == "wall_s"
                else [
                    sum(b) for b in zip(*(r[name][figure] for r in results.values()), strict=True)
                ]
            )
            for name in ("everstep", "by hand")
        }
        ratios = [a / b for a, b in zip(series["everstep"], series["by hand"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        fastest = {name: statistics.quantiles(values, n=10)[0] for name, values in series.items()}
        summary[figure] = {
            "fastest_decile": fastest,
            "fastest_decile_ratio": fastest["everstep"] / fastest["by hand"],
            "median": {name: statistics.median(values) for name, values in series.items()},
            "ratio_quartiles": [low, middle, high],
            "difference_median_ms": 1e3
            * statistics.median(
                a - b for a, b in zip(series["everstep"], series["by hand"], strict=True)
            ),
        }
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--blocks", type=int, default=40, help="turns of each loop, at least 2")
    parser.add_argument("--steps", type=int, default=1, help="steps per turn")
    parser.add_argument("--json", type=Path, help="where to write the result")
    arguments = parser.parse_args()
    if arguments.blocks < 2:
        parser.error(
            f"--blocks: got {arguments.blocks}, expected at least 2: figures are quartiles"
        )
    if arguments.steps < 1:
        parser.error(f"--steps: got {arguments.steps}, expected at least 1")

    results = {}
    for ranks in MESHES:
        with tempfile.TemporaryDirectory() as folder:
            results[ranks] = run_ranks(ranks, arguments, Path(folder), tiny=False)
        with tempfile.TemporaryDirectory() as folder:
            narrow = run_ranks(ranks, arguments, Path(folder), tiny=True)
        for figure, summary in results[ranks].items():
            ours, theirs = summary["median"].values()
            low, middle, high = summary["ratio_quartiles"]
            print(
                f"{ranks} rank(s) {figure:7} per step: everstep {ours:.4f}  by hand {theirs:.4f}  "
                f"ratio {middle:.4f} [{low:.4f}, {high:.4f}], of the fastest decile "
                f"{summary['fastest_decile_ratio']:.4f}"
            )
        added_ms = narrow["wall_s"]["difference_median_ms"]
        results[ranks]["narrow_model"] = {**narrow, "share_of_half_a_second": added_ms / 500}
        print(
            f"{ranks} rank(s) narrow model: everstep adds {added_ms:.2f} ms per step to "
            f"{1e3 * narrow['wall_s']['median']['by hand']:.1f} ms, "
            f"{added_ms / 5:.2f} % of a step of 0.5 s"
        )
    if arguments.json:
        cpu = next(
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
        report = {
            "what": "step time of everstep's loop and of a hand-written loop, same model",
            "hardware": {"cpu": cpu, "cores": os.cpu_count()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "overrides": OVERRIDES,
            "blocks": arguments.blocks,
            "steps_per_block": arguments.steps,
            "ranks": results,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
