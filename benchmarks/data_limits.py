"""Whether data limits a step: time to get a step's batches, over sequence length x global batch.

    python benchmarks/data_limits.py [--quick] [--json OUT]

One rank reads samples in random order out of a mapped file of uint16 tokens (in the page cache),
and gets contiguous int64 inputs and targets. For each size, these take turns, round by round
(A B C ... C B A):

- ``ours``: ``TrainStream.next_step()``, assembled when it is asked for;
- ``ours, ahead``: the same with data.prefetch=2, what is left in the training thread, while a step
  "computes" (sleeps) for several times as long as the batches take;
- ``memcpy``: a copy of as many bytes as the step's batches have, out of an array that is no more in
  the cache than the tokens are: the physical limit of producing them;
- ``DataLoader`` and ``DataLoader, ahead``: torch's, over the same file and in the same random
  order, in its best way: whole batches by ``__getitems__``, no collation, persistent workers; the
  first in the calling process, the second with one worker, four batches ahead, and the same sleep.
  What they leave to do (to part inputs and targets) is timed with them.

Figures are per step: medians over rounds, and the ratio to ours of neighbouring turns with its
quartiles; CPU seconds are those of all threads and workers. Then the share of a real training
step of this machine that next_step() takes, for ``configs/`` that it can run; with data.prefetch
and without, steps take turns, too.
"""

import argparse
import contextlib
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from everstep.machine import read_cpu
from everstep.trainer.config import DataConfig
from everstep.trainer.config_load import load_config
from everstep.trainer.data import Corpus, CorpusPart, TrainStream, open_corpus
from everstep.trainer.data.prefetch import prefetched
from everstep.trainer.data.tokenizer import BytesTokenizer
from everstep.trainer.engine import TorchEngine, sum_over_ranks
from everstep.trainer.mesh_shape import resolve_mesh

SEQ_LENS = (256, 1024, 4096, 8192)
GLOBAL_BATCHES = (4, 16, 64)
TOKENS = 1 << 27
REAL = {
    "debug_single": [],
    "demo": ["mesh.tp=1", "mesh.dp_shard=1", "parallel.threads=auto"],
}
"""Config -> overrides that let one rank of this machine run it."""
AHEAD = 2


@dataclass(frozen=True)
class Size:
    """One cell of the grid."""

    seq_len: int
    global_batch: int

    @property
    def batch_bytes(self) -> int:
        """Inputs and targets of a step, int64."""
        return 2 * 8 * self.seq_len * self.global_batch


def corpus_of(tokens: Any) -> Corpus:
    """A corpus of mapped tokens, all for training."""
    part = CorpusPart(
        name="random",
        tokens_train=tokens,
        tokens_held_out=tokens[:0],
        digest="random",
        text_digest="random",
        documents=1,
        text_bytes=tokens.nbytes,
    )
    return Corpus(parts=(part,), tokenizer_digest="random", tokenizer=BytesTokenizer())


class MappedTokens(Dataset[torch.Tensor]):
    """What a careful user of torch's DataLoader writes: a whole batch in one call."""

    def __init__(self, tokens: Any, seq_len: int) -> None:
        self._tokens, self._seq_len = tokens, seq_len

    def __len__(self) -> int:
        return (self._tokens.size - 1) // self._seq_len

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        """(B, seq_len + 1) tokens."""
        length = self._seq_len
        rows = np.empty((len(indices), length + 1), dtype=np.int64)
        for row, index in zip(rows, indices, strict=True):
            row[:] = self._tokens[index * length : (index + 1) * length + 1]
        return torch.from_numpy(rows)


def loader(tokens: Any, size: Size, workers: int) -> DataLoader[torch.Tensor]:
    """torch's, with as many workers."""
    dataset = MappedTokens(tokens, size.seq_len)
    generator = torch.Generator().manual_seed(0)
    sampler = BatchSampler(
        RandomSampler(dataset, generator=generator), size.global_batch, drop_last=True
    )
    ahead = {"prefetch_factor": 4, "persistent_workers": True} if workers else {}
    return DataLoader(
        dataset, batch_sampler=sampler, num_workers=workers, collate_fn=lambda rows: rows, **ahead
    )


def endless(source: DataLoader[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Epoch after epoch."""
    while True:
        yield from source


def parted(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, contiguous."""
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def cpu_s(children: list[int]) -> float:
    """CPU time of this process and of some children so far."""
    total = time.process_time()
    for pid in children:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def turn(produce: Callable[[], object], steps: int, sleep_s: float) -> float:
    """Seconds per step that ``produce`` keeps its caller, with a pause between the steps."""
    spent_s = 0.0
    for _ in range(steps):
        if sleep_s:
            time.sleep(sleep_s)
        began_s = time.perf_counter()
        produce()
        spent_s += time.perf_counter() - began_s
    return spent_s / steps


def measure(tokens: Any, size: Size, rounds: int, turn_s: float) -> dict[str, Any]:
    """All ways for one size, taking turns."""
    config = DataConfig(
        seq_len=size.seq_len, global_batch=size.global_batch, held_out=0, source="unused"
    )
    corpus = corpus_of(tokens)
    here = TrainStream(corpus, config, 0, 0, 1)
    source = np.frombuffer(tokens, dtype=np.uint8)
    target = np.empty(size.batch_bytes, dtype=np.uint8)
    places = np.random.default_rng(0).integers(0, source.size - target.size, 1 << 16)
    place = cycle(places.tolist())

    def memcpy() -> None:
        at = next(place)
        np.copyto(target, source[at : at + target.size])

    with prefetched(TrainStream(corpus, config, 1, 0, 1), AHEAD) as ahead:
        background = loader(tokens, size, workers=1)
        worker_batches, batches = endless(background), endless(loader(tokens, size, workers=0))
        next(worker_batches)
        iterator: Any = background._iterator
        pids = [worker.pid for worker in iterator._workers]
        ways: dict[str, Callable[[], object]] = {
            "ours": here.next_step,
            "ours, ahead": ahead.next_step,
            "memcpy": memcpy,
            "DataLoader": lambda: parted(next(batches)),
            "DataLoader, ahead": lambda: parted(next(worker_batches)),
        }
        once_s = max(turn(way, 3, 0.0) for way in ways.values())
        steps = max(3, min(200, int(turn_s / once_s)))
        taken: dict[str, list[float]] = {name: [] for name in ways}
        burnt: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds):
            for name in list(ways) if number % 2 == 0 else list(ways)[::-1]:
                sleep_s = 4 * once_s if name.endswith("ahead") else 0.0
                before_s = cpu_s(pids)
                taken[name].append(turn(ways[name], steps, sleep_s))
                burnt[name].append((cpu_s(pids) - before_s) / steps)
        iterator._shutdown_workers()
    gc.collect()
    return {
        "seq_len": size.seq_len,
        "global_batch": size.global_batch,
        "batch_bytes": size.batch_bytes,
        "steps_per_turn": steps,
        "wall_s": {name: statistics.median(values) for name, values in taken.items()},
        "cpu_s": {name: statistics.median(values) for name, values in burnt.items()},
        "wall_ratio_quartiles": {
            "ours / memcpy": ratio_quartiles(taken["ours"], taken["memcpy"]),
            "ours / DataLoader": ratio_quartiles(taken["ours"], taken["DataLoader"]),
            "ours, ahead / DataLoader, ahead": ratio_quartiles(
                taken["ours, ahead"], taken["DataLoader, ahead"]
            ),
        },
    }


def ratio_quartiles(first: list[float], second: list[float]) -> list[float]:
    """Quartiles of first / second, round by round (pure)."""
    return statistics.quantiles([a / b for a, b in zip(first, second, strict=True)], n=4)


def share_of_step(name: str, overrides: list[str], steps: int, folder: Path) -> dict[str, Any]:
    """How much of a real step one rank waits for data, assembled ahead and not, step by step."""
    config = load_config(name, [*overrides, "train.eval_batches=0", "train.eval_every=0"])
    shape = resolve_mesh(config.mesh, 1)
    corpus = open_corpus(config.data, folder / "cache")
    engine = TorchEngine(config, shape, torch.device("cpu"), corpus.vocab_size)
    taken: dict[int, list[tuple[float, float]]] = {0: [], AHEAD: []}
    with contextlib.ExitStack() as open_streams:
        streams = {
            ahead: open_streams.enter_context(
                prefetched(TrainStream(corpus, config.data, config.seed, 0, 1), ahead)
            )
            for ahead in taken
        }
        for number in range(steps):
            for ahead in list(taken) if number % 2 == 0 else list(taken)[::-1]:
                began_s = time.perf_counter()
                batches = streams[ahead].next_step()
                data_s = time.perf_counter() - began_s
                sum_over_ranks(engine.forward_backward(batches).reshape(1), 1)
                engine.apply_gradients()
                taken[ahead].append((data_s, time.perf_counter() - began_s))
    result: dict[str, Any] = {"overrides": overrides}
    for ahead, pairs in taken.items():
        shares = [data_s / step_s for data_s, step_s in pairs[2:]]
        result[f"prefetch={ahead}"] = {
            "step_s": statistics.median(step_s for _, step_s in pairs[2:]),
            "data_s": statistics.median(data_s for data_s, _ in pairs[2:]),
            "data_share_quartiles": statistics.quantiles(shares, n=4),
        }
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="the corners of the grid, briefly")
    parser.add_argument("--rounds", type=int, help="turns of each way (21; 5 with --quick)")
    parser.add_argument("--json", type=Path, help="where to write the result")
    arguments = parser.parse_args()
    quick = arguments.quick
    rounds = arguments.rounds or (5 if quick else 21)
    sizes = [Size(length, batch) for length in SEQ_LENS for batch in GLOBAL_BATCHES]
    if quick:
        sizes = [Size(SEQ_LENS[0], GLOBAL_BATCHES[0]), Size(SEQ_LENS[-1], GLOBAL_BATCHES[-1])]

    cells, real = [], {}
    with tempfile.TemporaryDirectory(prefix="everstep-bench-") as name:
        folder = Path(name)
        count = TOKENS >> 3 if quick else TOKENS
        made = np.memmap(folder / "tokens", dtype=np.uint16, mode="w+", shape=(count,))
        for part in np.array_split(made, 64):
            part[:] = np.random.default_rng(part.size).integers(0, 50_000, part.size)
        made.flush()
        tokens = np.memmap(folder / "tokens", dtype=np.uint16, mode="r")
        tokens.max()  # into the page cache
        for size in sizes:
            cell = measure(tokens, size, rounds, turn_s=0.02 if quick else 0.1)
            cells.append(cell)
            wall = "  ".join(f"{way} {1e6 * s:,.0f}" for way, s in cell["wall_s"].items())
            low, middle, high = cell["wall_ratio_quartiles"]["ours / memcpy"]
            print(
                f"{size.seq_len:5} x {size.global_batch:3}  us per step: {wall}  "
                f"ours/memcpy {middle:.2f} [{low:.2f}, {high:.2f}]",
                flush=True,
            )
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1
        )
        for config, overrides in REAL.items():
            real[config] = share_of_step(config, overrides, 8 if quick else 60, folder / config)
            for setting in ("prefetch=0", f"prefetch={AHEAD}"):
                found = real[config][setting]
                print(
                    f"{config} {setting}: step {1e3 * found['step_s']:.1f} ms, data "
                    f"{100 * found['data_share_quartiles'][1]:.3f} % of it",
                    flush=True,
                )
        dist.destroy_process_group()
    if arguments.json:
        report = {
            "what": "time to get a step's batches, beside memcpy, a DataLoader and a real step",
            "hardware": {"cpu": read_cpu().name, "cores": os.cpu_count()},
            "versions": {
                "python": platform.python_version(),
                "numpy": np.__version__,
                "torch": torch.__version__,
            },
            "tokens": count,
            "rounds": rounds,
            "grid": cells,
            "real_steps": real,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
