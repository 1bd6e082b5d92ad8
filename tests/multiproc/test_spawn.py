"""The pool of ranks that other tests stand on."""

import multiprocessing
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.spawn import RankError, run_ranks

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(300)]


def _sum_of_ranks(rank: int, world_size: int, scale: float) -> tuple[float, int]:
    value = torch.tensor([scale * rank])
    dist.all_reduce(value)
    return value.item(), os.getpid()


def _raise_on(rank: int, world_size: int, bad: int) -> None:
    if rank == bad:
        raise ValueError("no such thing")
    dist.barrier()


def _die_on(rank: int, world_size: int, bad: int) -> None:
    if rank == bad:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _sleep_on(rank: int, world_size: int, bad: int) -> None:
    if rank == bad:
        time.sleep(60)


def test_results_come_by_rank_and_no_process_stays() -> None:
    results = run_ranks(_sum_of_ranks, 3, 10.0)
    assert [value for value, _ in results] == [30.0, 30.0, 30.0]
    assert len({pid for _, pid in results}) == 3
    assert not any(Path(f"/proc/{pid}").exists() for _, pid in results)


def test_the_raising_rank_is_named_not_its_neighbours() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 3 failed: [\s\S]*no such thing") as caught:
        run_ranks(_raise_on, 3, 1)
    assert isinstance(caught.value.error, ValueError)
    assert run_ranks(_sum_of_ranks, 3, 1.0)[0][0] == 3.0


def test_a_killed_rank_is_named() -> None:
    with pytest.raises(RankError, match="rank 1 of 2 failed: the process ended with exit code -9"):
        run_ranks(_die_on, 2, 1)


def test_a_silent_rank_is_shown_where_it_waits() -> None:
    start_s = time.monotonic()
    with pytest.raises(RankError, match=r"no result within 2 s[\s\S]*_sleep_on"):
        run_ranks(_sleep_on, 2, 0, timeout_s=2)
    assert time.monotonic() - start_s < 20


def _write_pid_and_hang(rank: int, world_size: int, folder: str) -> None:
    draft = Path(folder, f"{rank}.draft")
    draft.write_text(str(os.getpid()))
    draft.rename(Path(folder, f"{rank}.pid"))
    time.sleep(100)


def _hang(folder: str) -> None:
    tempfile.tempdir = folder
    run_ranks(_write_pid_and_hang, 2, folder)


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_ranks_end_when_the_test_process_is_killed(tmp_path: Path) -> None:
    parent = multiprocessing.get_context("spawn").Process(target=_hang, args=(str(tmp_path),))
    parent.start()
    deadline_s = time.monotonic() + 60
    try:
        while len(list(tmp_path.glob("*.pid"))) < 2:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.join()
    pids = [int(file.read_text()) for file in tmp_path.glob("*.pid")]
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
