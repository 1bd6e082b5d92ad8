"""Storage is slow, full or away: training goes on, and durability catches up afterwards."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.keepers import eventually
from tests.support.survivors import LIMIT_S, Survival, Trainers, survival
from tests.support.tcp_proxy import TcpProxy

if TYPE_CHECKING:
    from tests.support.s3_server import S3Server

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(120)]


def _durable_after(job: Survival, trainers: Trainers, step: int) -> None:
    """A step that was saved after ``step`` becomes durable."""

    def is_so() -> bool:
        time.sleep(0.1)  # a look at S3 opens connections
        return max(job.durable(), default=-1) > step

    trainers.wait_for(is_so)


def test_slow_storage(tmp_path: Path) -> None:
    """A flush that does not end holds up neither training nor snapshots; nobody is warned."""
    pause = tmp_path / "pause"
    with survival(tmp_path) as job:
        # written in pieces of 100 kB
        run = job.run(60, durable_every=2, pause=pause, rate_bytes_per_s=800_000, keep=100)
        with job.attempt(2, run) as trainers:
            with job.held("writing") as wait_there:
                wait_there(0, 1)
                trainers.wait_saved(30)
                pause.touch()
                running = job.status()["flushes"]["running"]
                assert sorted(r["rank"] for r in running) == [0, 1]
                assert all(0 < r["written_bytes"] < 200_000 for r in running)
                assert not job.durable()
                skipped = [line for line in trainers.lines() if line.get("skipped")]
                assert len(skipped) <= 5, skipped
                assert trainers.newest_sealed() > 20
            _durable_after(job, trainers, 0)
            job.look_at_slots()
            pause.unlink()
            told = trainers.finish()
            assert told["taken"] + told["skipped_steps"] == 61
            assert not trainers.told("warning")
        assert job.durable()[1] > 30
        job.assert_undamaged()
        job.stop_keeper()


def _failures(trainers: Trainers, rank: int = 0) -> list[str]:
    """Warnings that a step could not be made durable.

    Another one may tell of a step that was committed just before: older ones could not be deleted.
    """
    return [text for text in trainers.told("warning", rank) if "older checkpoints" not in text]


def _outage(job: Survival, trainers: Trainers, away: Callable[[], None]) -> None:
    """Several flushes fail, training goes on, and each rank warns once.

    Args:
        job: the job.
        trainers: its processes.
        away: has storage fail from now on; may be repeated.
    """
    warned = len(_failures(trainers))
    failed = job.status()["flushes"]["failed"]

    def is_noticed() -> bool:
        away()
        enough = job.status()["flushes"]["failed"] >= failed + 6
        return enough and all(len(_failures(trainers, r)) > warned for r in range(2))

    trainers.wait_for(is_noticed)
    step = trainers.newest_sealed()
    trainers.wait_for(lambda: trainers.newest_sealed() > step + 5)
    for rank in range(2):
        found = _failures(trainers, rank)[warned:]
        assert len(found) == 1, found
        assert "could not be made durable; training goes on" in found[0]


def _survive_outages(
    job: Survival, away: Callable[[], None], back: Callable[[], None], outages: int
) -> list[str]:
    """What rank 0 has warned of."""
    run = job.run(10**6, durable_every=2, width=32, pause_s=0.01, deadline_s=8.0)
    with job.attempt(2, run) as trainers:
        _durable_after(job, trainers, 0)
        for _ in range(outages):
            _outage(job, trainers, away)
            back()
            job.assert_undamaged()
            _durable_after(job, trainers, trainers.newest_sealed())
        warnings = _failures(trainers)
        trainers.kill()
        (newest,) = job.whole_in_memory()[-1:]
    eventually(lambda: not job.status()["flushes"]["running"], LIMIT_S)
    assert job.durable()[-1] == newest.step
    job.assert_undamaged()
    job.stop_keeper()
    return warnings


def test_a_full_disk(tmp_path: Path, small_disk: Path) -> None:
    filler = small_disk / "filler"

    def fill() -> None:
        """Whatever checkpoints that were deleted have left."""
        with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    with survival(tmp_path, root=small_disk / "checkpoints") as job:
        warnings = _survive_outages(job, fill, filler.unlink, outages=2)
    assert len(warnings) == 2
    assert all("No space left on device" in warning for warning in warnings)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_s3_is_away(tmp_path: Path, s3: "S3Server") -> None:
    with TcpProxy(s3.endpoint.removeprefix("http://")) as proxy:
        options = {
            **s3.options,
            "endpoint_url": f"http://{proxy.address}",
            "config_kwargs": {"retries": {"max_attempts": 1}},
        }
        with survival(tmp_path, root=s3.new_url(), storage_options=options) as job:
            warnings = _survive_outages(job, proxy.go_away, proxy.come_back, outages=1)
    assert len(warnings) == 1
