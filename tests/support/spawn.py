"""Run a function on several gloo ranks: a session-wide pool of forked worker processes.

Importing torch costs seconds, so a fork server imports it once and workers are forked from there.
Workers are reused from call to call (any world size; a fresh process group each time) and thrown
away when a call fails, so that nothing a broken rank left behind reaches the next test.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

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
_PR_SET_PDEATHSIG = 1


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
    process: BaseProcess
    pipe: Connection
    log: Path

    def log_tail(self, limit_bytes: int = 4000) -> str:
        text = self.log.read_bytes()[-limit_bytes:].decode(errors="replace").strip()
        return f"\n--- end of its output ---\n{text}" if text else ""

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self.log.unlink(missing_ok=True)


class RankPool:
    """Workers that are idle between calls."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self._folder = Path(tempfile.mkdtemp(prefix="everstep-ranks-"))
        self._idle: list[_Worker] = []
        self._count = 0

    def run(
        self, fn: Callable[..., Any], world_size: int, args: tuple[Any, ...], timeout_s: float
    ) -> list[Any]:
        workers = self._take(world_size)
        rendezvous = self._folder / f"rendezvous-{self._next()}"
        try:
            call = pickle.dumps((fn, args))
            for rank, worker in enumerate(workers):
                worker.pipe.send((call, rank, world_size, str(rendezvous), timeout_s))
            results = _collect(workers, timeout_s)
        except BaseException:
            for worker in workers:
                worker.kill()
            raise
        finally:
            rendezvous.unlink(missing_ok=True)
        self._idle.extend(workers)
        return results

    def close(self) -> None:
        for worker in self._idle:
            worker.kill()
        self._idle.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _next(self) -> int:
        self._count += 1
        return self._count

    def _take(self, count: int) -> list[_Worker]:
        workers, self._idle = self._idle[:count], self._idle[count:]
        fresh = [self._start() for _ in range(count - len(workers))]
        for worker in fresh:
            if not worker.pipe.poll(START_LIMIT_S):
                for each in [*workers, *fresh]:
                    each.kill()
                raise RankError(0, f"a worker did not start within {START_LIMIT_S:.0f} s")
            worker.pipe.recv()
        return workers + fresh

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        log = self._folder / f"worker-{self._next()}.log"
        process = self._context.Process(target=_serve, args=(theirs, str(log)), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process=process, pipe=ours, log=log)


_pool: RankPool | None = None


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0
) -> list[Any]:
    """Call ``fn(rank, world_size, *args)`` on every rank of a new gloo group; results by rank.

    ``fn`` is a module-level function; arguments and results are pickled (return NumPy arrays and
    Python values rather than tensors). Raises RankError with the first failing rank's traceback.
    """
    global _pool
    if _pool is None:
        _pool = RankPool()
        atexit.register(_pool.close)
    return _pool.run(fn, world_size, args, timeout_s)


def _collect(workers: Sequence[_Worker], timeout_s: float) -> list[Any]:
    """Wait for every worker's result; raise RankError once one fails or time is up."""
    results: dict[int, Any] = {}
    failures: list[_Failure] = []
    deadline_s = time.monotonic() + timeout_s
    waiting = {worker.pipe: rank for rank, worker in enumerate(workers)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline_s - time.monotonic()))
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            outcome = _receive(workers[rank], rank)
            if isinstance(outcome, _Failure):
                failures.append(outcome)
            else:
                results[rank] = outcome[0]
        if failures and time.monotonic() < deadline_s and deadline_s - time.monotonic() > 0.5:
            deadline_s = time.monotonic() + 0.5  # neighbours that failed with it, to name the first
        elif not ready:
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


def _serve(pipe: Connection, log: str) -> None:
    """A worker's life: answer calls until the pipe closes."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__ or 2, all_threads=True)
    import torch

    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    pipe.send("ready")
    while True:
        try:
            call, rank, world_size, rendezvous, timeout_s = pipe.recv()
        except EOFError:
            return
        try:
            result = _call_in_group(call, rank, world_size, rendezvous, timeout_s)
            pipe.send(("result", pickle.dumps(result)))
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            pipe.send(("error", time.monotonic(), text, _pickled(error)))
            return  # the group is in an unknown state: end here, the pool starts another
        sys.stdout.flush()


def _call_in_group(
    call: bytes, rank: int, world_size: int, rendezvous: str, timeout_s: float
) -> Any:
    import numpy as np
    import torch
    import torch.distributed as dist

    fn, args = pickle.loads(call)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    result = fn(rank, world_size, *args)
    dist.barrier()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
    return result


def _pickled(error: Exception) -> bytes | None:
    """The exception for the parent, or None if it does not survive the way."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:
        return None
    return data
