"""Run a function on several gloo ranks, each a freshly forked process.

Importing torch costs seconds, so a fork server does it once per test session and every rank is
forked from there (about 0.1 s). Ranks are never reused: DTensor and FSDP2 cache device meshes whose
process groups do not outlive the call.
"""

import contextlib
import faulthandler
import math
import multiprocessing
import os
import pickle
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

PRELOAD = [
    "pytest",
    "numpy",
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
    "everstep.trainer.worker_main",
    "everstep.trainer.parallelize",
]
START_LIMIT_S = 180.0


class RankError(AssertionError):
    """A rank raised, died or did not answer in time.

    ``rank`` and ``error`` (the exception it raised, where that could be pickled) are those of the
    first rank that failed; the message has its traceback and the end of its output.
    """

    def __init__(self, rank: int, message: str, error: Exception | None = None) -> None:
        super().__init__(message)
        self.rank = rank
        self.error = error


@dataclass(frozen=True)
class _Failure:
    rank: int
    died: bool
    time_s: float
    text: str
    error: Exception | None


@dataclass(frozen=True)
class _Worker:
    rank: int
    process: BaseProcess
    pipe: Connection
    lifeline: Connection
    log: Path

    def log_tail(self, limit_bytes: int = 4000) -> str:
        text = self.log.read_bytes()[-limit_bytes:].decode(errors="replace").strip()
        return f"\n--- end of its output ---\n{text}" if text else ""

    def wait_started(self) -> None:
        if not self.pipe.poll(START_LIMIT_S):
            raise RankError(self.rank, f"rank {self.rank} did not start in {START_LIMIT_S:.0f} s")
        with contextlib.suppress(EOFError):  # it died: noticed when its result is missing
            self.pipe.recv()

    def send(self, call: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send_bytes(call)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()
        self.lifeline.close()


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0
) -> list[Any]:
    """Call ``fn(rank, world_size, *args)`` on every rank of a new gloo group; results by rank.

    ``fn`` is a module-level function; arguments and results are pickled (return NumPy arrays and
    Python values rather than tensors). Raises RankError with the first failing rank's traceback.
    Every rank has ended when this returns or raises.
    """
    call = pickle.dumps((fn, args))
    workers: list[_Worker] = []
    with tempfile.TemporaryDirectory(prefix="everstep-ranks-") as folder:
        try:
            workers.extend(
                _start(Path(folder), rank, world_size, timeout_s) for rank in range(world_size)
            )
            for worker in workers:
                worker.wait_started()
            for worker in workers:
                worker.send(call)
            return _collect(workers, timeout_s)
        finally:
            for worker in workers:
                worker.kill()


def _start(folder: Path, rank: int, world_size: int, timeout_s: float) -> _Worker:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ours, theirs = context.Pipe()
    lifeline, held = context.Pipe(duplex=False)
    log = folder / f"rank-{rank}.log"
    arguments = (
        theirs,
        lifeline,
        str(log),
        rank,
        world_size,
        str(folder / "rendezvous"),
        timeout_s,
    )
    process = context.Process(target=_serve, args=arguments, daemon=True)
    process.start()
    theirs.close()
    lifeline.close()
    return _Worker(rank=rank, process=process, pipe=ours, lifeline=held, log=log)


def _collect(workers: Sequence[_Worker], timeout_s: float) -> list[Any]:
    """Wait for every worker's result; raise RankError once one fails or time is up."""
    results: dict[int, Any] = {}
    failures: list[_Failure] = []
    deadline_s, first_failure_s = time.monotonic() + timeout_s, math.inf
    waiting = {worker.pipe: rank for rank, worker in enumerate(workers)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline_s - time.monotonic()))
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            outcome = _receive(workers[rank], rank)
            if isinstance(outcome, _Failure):
                failures.append(outcome)
                first_failure_s = min(first_failure_s, time.monotonic())
            else:
                results[rank] = outcome[0]
        if failures:  # a moment for others that failed with it, to name the first
            deadline_s = min(deadline_s, first_failure_s + 0.2)
        if not ready:
            break
    if failures:
        first = min(failures, key=lambda failure: (not failure.died, failure.time_s))
        text = f"rank {first.rank} of {len(workers)} failed: {first.text}"
        raise RankError(first.rank, text + workers[first.rank].log_tail(), first.error)
    if waiting:
        raise _timed_out(workers, sorted(waiting.values()), timeout_s)
    return [results[rank] for rank in range(len(workers))]


def _receive(worker: _Worker, rank: int) -> tuple[Any] | _Failure:
    """A one-tuple with the result of this rank, or its failure."""
    try:
        kind, *payload = worker.pipe.recv()
    except EOFError:
        worker.process.join(5)
        code = worker.process.exitcode
        text = f"the process ended with exit code {code} and no result"
        return _Failure(rank, died=True, time_s=time.monotonic(), text=text, error=None)
    if kind == "result":
        return (pickle.loads(payload[0]),)
    time_s, text, pickled = payload
    error = pickle.loads(pickled) if pickled else None
    return _Failure(rank, died=False, time_s=time_s, text=text, error=error)


def _timed_out(workers: Sequence[_Worker], ranks: Sequence[int], timeout_s: float) -> RankError:
    """Ask the silent ranks where they are, and say so."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(workers[rank].process.pid or 0, signal.SIGUSR1)
    time.sleep(0.5)  # faulthandler writes in the signal handler; there is nothing to wait on
    text = f"ranks {list(ranks)} of {len(workers)} gave no result within {timeout_s:g} s"
    return RankError(ranks[0], text + "".join(workers[rank].log_tail() for rank in ranks))


def _serve(
    pipe: Connection,
    lifeline: Connection,
    log: str,
    rank: int,
    world_size: int,
    rendezvous: str,
    timeout_s: float,
) -> None:
    """The life of a rank: start, answer one call, end."""
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch

    torch.set_num_threads(1)
    pipe.send("started")
    try:
        fn, args = pickle.loads(pipe.recv_bytes())
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(0)
        result = _call_in_group(fn, args, rank, world_size, rendezvous, timeout_s)
        pipe.send(("result", pickle.dumps(result)))
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        pipe.send(("error", time.monotonic(), text, _pickled(error)))
    pipe.recv()  # stay until killed: a closing connection would make neighbours fail as well


def _end_with(lifeline: Connection) -> None:
    """End this process when the test's process ends, even if that was killed."""
    lifeline.poll(None)
    os._exit(1)


def _call_in_group(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    rendezvous: str,
    timeout_s: float,
) -> Any:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    return fn(rank, world_size, *args)


def _pickled(error: Exception) -> bytes | None:
    """The exception for the parent, or None if it does not survive the way."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:
        return None
    return data
