"""Ranks of the checkpoint benchmark: gloo processes that live as long as it does."""

import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

ANSWER_LIMIT_S = 600.0


class Ranks:
    """Processes that call methods of an object each has made; a context manager.

    Args:
        make: ``module:function`` that makes the object of a rank, from ``rank`` and ``args``.
        world_size: how many.
        folder: for what the processes need to find each other.
    """

    def __init__(self, make: str, world_size: int, folder: Path, *args: Any) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(["numpy", "torch", "torch.distributed.checkpoint"])
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            call = (theirs, make, rank, world_size, str(folder / "rendezvous"), args)
            process = context.Process(target=_serve, args=call, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._answers()

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method on every rank; results by rank.

        Raises:
            RuntimeError: a rank failed or gave no answer in time.
        """
        for pipe in self._pipes:
            pipe.send((method, args))
        return self._answers()

    def _answers(self) -> list[Any]:
        """As soon as one has failed the others may wait for it in vain."""
        found: dict[int, Any] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        deadline_s = time.monotonic() + ANSWER_LIMIT_S
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline_s - time.monotonic()))
            if not ready:
                raise RuntimeError(f"ranks {sorted(waiting.values())} gave no answer in time")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    failure, found[rank] = pipe.recv()
                except EOFError:
                    failure = "its process ended"
                if failure:
                    raise RuntimeError(f"rank {rank} failed: {failure}")
        return [found[rank] for rank in range(len(self._pipes))]

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(0.0 if error else 10.0)
            process.kill()
            process.join()
            process.close()


def _serve(
    pipe: Connection, make: str, rank: int, world_size: int, rendezvous: str, args: Any
) -> None:
    """The life of a rank; it ends when the other end of the pipe is closed."""
    import importlib

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    method: Callable[..., Any]
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=ANSWER_LIMIT_S),
        )
        module, _, function = make.partition(":")
        worker = getattr(importlib.import_module(module), function)(rank, *args)
        pipe.send((None, None))
        while True:
            try:
                name, given = pipe.recv()
            except EOFError:
                break
            method = getattr(worker, name)
            pipe.send((None, method(*given)))
    except Exception:
        with suppress(BrokenPipeError):  # another rank's failure has been taken before
            pipe.send((traceback.format_exc(), None))
    os._exit(0)  # no collective farewell: ranks end one by one
