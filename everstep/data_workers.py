"""Processes that tokenize parts of a text, and what becomes of them."""

import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from everstep.data_view import TokenizeDisplay
from everstep.trainer.data.tokenize_plan import Part
from everstep.trainer.data.tokenize_work import Job, PartResult, work
from everstep.trainer.errors import DataError


def run_parts(
    job: Job, parts: Sequence[Part], workers: int, display: TokenizeDisplay
) -> dict[int, PartResult]:
    """Results of all parts, by number; largest parts first, so that none is waited for long.

    However this ends, no process is left. They end by themselves if this process is killed.

    Raises:
        EverstepError: what a worker met; the other parts in work are given up.
        DataError: a worker died.
    """
    waiting = sorted(parts, key=lambda part: (part.size_bytes, -part.number))
    context = multiprocessing.get_context("spawn")
    running: dict[Connection, SpawnProcess] = {}
    results: dict[int, PartResult] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, job), daemon=True)
            process.start()
            theirs.close()
            running[ours] = process
            _send(ours, process, waiting.pop())
        while len(results) < len(parts):
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                kind, value = _receive(ready, running[ready])
                if kind == "read":
                    display.read(value)
                elif kind == "error":
                    raise value
                else:
                    number, results[number] = value
                    display.part_done()
                    if waiting:
                        _send(ready, running[ready], waiting.pop())
        return results
    finally:
        for connection, process in running.items():
            connection.close()
            process.kill()
            process.join()


def _receive(connection: Connection, process: SpawnProcess) -> tuple[str, Any]:
    """The next report of a worker."""
    try:
        kind, value = connection.recv()
    except (EOFError, OSError) as error:
        raise _died(process) from error
    return kind, value


def _send(connection: Connection, process: SpawnProcess, part: Part) -> None:
    """Gives a worker something to do."""
    try:
        connection.send(part)
    except OSError as error:
        raise _died(process) from error


def _died(process: SpawnProcess) -> DataError:
    process.join()
    return DataError(
        f"a tokenizing process died (exit code {process.exitcode}; -9 often means that memory ran "
        "out); run the same command again, perhaps with fewer --workers"
    )
