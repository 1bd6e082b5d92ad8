"""All trainers are killed, or some, or the keeper: training goes on from the newest sealed step.

Every attempt takes up where the one before was killed, and tells the digest of what it has loaded:
that of the same step of a run which nobody interrupted.
"""

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.errors import DirectoryInUseError
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.lock import DirectoryLock
from everstep.checkpoint.torch_state import State
from tests.support.keepers import eventually, processes_of
from tests.support.spawn import run_ranks
from tests.support.survivors import (
    BEFORE_SEAL,
    LOAD_POINTS,
    POINTS,
    Run,
    Stop,
    Survival,
    Trainers,
    reference,
    survival,
)

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(120)]
STEPS = 120


def _reference(rank: int, world_size: int, dropout: float) -> list[str]:
    return reference(STEPS, dropout)


@pytest.fixture(scope="module")
def digests() -> list[str]:
    """Of the state after each step, without any interruption; for any layout."""
    found: list[str] = run_ranks(_reference, 1, 0.0)[0]
    return found


@pytest.fixture(scope="module")
def random_digests() -> list[str]:
    """The same where each step needs random numbers, which only the same layout has."""
    found: list[str] = run_ranks(_reference, 1, 0.25)[0]
    return found


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Survival]:
    """With a running keeper."""
    with survival(tmp_path) as started:
        yield started


class Chain:
    """Attempts of one job, each of which goes on from the newest snapshot that is whole."""

    def __init__(self, job: Survival, digests: list[str], dropout: float = 0.0) -> None:
        self.job, self.digests, self.dropout = job, digests, dropout
        self.newest: StepId | None = None
        self.trainers: Trainers

    @property
    def next_step(self) -> int:
        """The first that the next attempt makes."""
        return 0 if self.newest is None else self.newest.step + 1

    def begin(self, world_size: int, *stops: Stop, steps: int = STEPS, **changes: object) -> Run:
        """Start an attempt; it goes to ``steps`` if nobody ends it."""
        run = self.job.run(steps, stops=stops, dropout=self.dropout, **changes)
        self.trainers = self.job.attempt(world_size, run)
        return run

    def look(self) -> None:
        """After the attempt has ended: it had resumed as it should; what has it left?"""
        with self.trainers:
            self.trainers.kill()
            started = self.trainers.told("start")
            if started:
                assert started == [self.next_step]
            if started and self.newest is not None:
                assert self.trainers.told("digest") == [self.digests[self.newest.step]]
                assert "memory" in self.trainers.told("path")[0]
            last = self.newest.step if self.newest else -1
            sealed = max(self.trainers.newest_sealed(), last)
        whole = self.job.whole_in_memory()
        self.newest = whole[-1] if whole else None
        assert self.next_step - 1 >= sealed

    def finish(self, world_size: int, steps: int, **changes: object) -> None:
        """An attempt that nobody interrupts; the last."""
        with self.job.attempt(
            world_size, self.job.run(steps, dropout=self.dropout, **changes)
        ) as trainers:
            told = trainers.finish()
        assert told["start"] == self.next_step
        if self.newest is not None:
            assert told["digest"] == self.digests[self.newest.step]
            assert "memory" in told["path"]
        assert told["final"] == self.digests[steps]


def _die_at(chain: Chain, world_size: int, point: str, step: int, ranks: tuple[int, ...]) -> None:
    """Kill all trainers while some are at a point, and look which snapshot is the newest one."""
    before = chain.next_step - 1
    step = 0 if point in LOAD_POINTS else step
    chain.begin(world_size, *(Stop(rank, point, step) for rank in ranks))
    stopped = chain.trainers.wait_stopped()[0]
    lines = [
        line for line in chain.trainers.lines(ranks[0]) if line.get("saved", stopped) < stopped
    ]
    captured = [line["saved"] for line in lines if line["skipped"] is None]
    last = max(captured, default=before)
    newest_sealed = chain.trainers.newest_sealed
    if point in BEFORE_SEAL:  # the ranks that did not stop do not get any further
        eventually(lambda: max(newest_sealed(), before) == last)
    elif point not in LOAD_POINTS and len(ranks) == world_size:
        eventually(lambda: newest_sealed() == stopped)
    chain.look()
    if point in BEFORE_SEAL:
        assert chain.next_step == last + 1
    elif point in LOAD_POINTS:
        assert chain.next_step == before + 1
    elif len(ranks) == world_size:
        assert chain.next_step == stopped + 1


def test_killed_at_points_of_a_step(job: Survival, digests: list[str]) -> None:
    chain = Chain(job, digests)
    _die_at(chain, 2, "half sealed", 3, (0, 1))
    _die_at(chain, 1, "copying", 6, (0,))
    _die_at(chain, 2, "looked", 0, (1,))
    _die_at(chain, 2, "sealed", 8, (1,))
    _die_at(chain, 2, "ordered", 10, (0, 1))
    _die_at(chain, 2, "loading", 0, (0,))
    chain.finish(2, chain.next_step + 5)
    job.stop_keeper()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [(0, 1), (0,), (1,)])
@pytest.mark.parametrize("layouts", [(2, 2), (1, 2)])
def test_killed_at_every_point(
    job: Survival,
    digests: list[str],
    random_digests: list[str],
    ranks: tuple[int, ...],
    layouts: tuple[int, int],
) -> None:
    """On two ranks at each point; with an attempt on another layout between, or without."""
    other, _ = layouts
    chain = Chain(job, *((random_digests, 0.25) if other == 2 else (digests, 0.0)))
    for point in (*POINTS, *LOAD_POINTS):
        _die_at(chain, 2, point, chain.next_step + 2, ranks)
        if other == 1:
            _die_at(chain, 1, "told", chain.next_step + 1, (0,))
    chain.finish(2, chain.next_step + 5)
    job.stop_keeper()


def test_one_trainer_is_killed(job: Survival, digests: list[str]) -> None:
    """The other one notices, and ends by itself; what it holds stays for the next attempt."""
    chain = Chain(job, digests)
    chain.begin(2, Stop(1, "copied", 4))
    chain.trainers.wait_stopped()
    eventually(lambda: 4 in chain.trainers.told("sealed", 0))
    chain.trainers.kill(1)
    assert chain.trainers.join() == [1, -signal.SIGKILL]
    chain.look()
    assert chain.newest == StepId(1, 3)
    chain.finish(2, 8)
    job.stop_keeper()


def _random_kills(job: Survival, digests: list[str], kills: int, seed: int) -> None:
    """Of all trainers at once, or of one and a moment later of the others; on one rank or two."""
    random_, chain = random.Random(seed), Chain(job, digests)
    for _ in range(kills):
        world_size = random_.choice((1, 2, 2))
        chain.begin(world_size)
        trainers = chain.trainers
        if random_.random() < 0.8:
            trainers.wait_saved(chain.next_step + random_.randrange(6))
            time.sleep(random_.uniform(0.0, 0.03))
        else:  # some of these are killed before they know where to begin
            time.sleep(random_.uniform(0.2, 0.8))
        if random_.random() < 0.5:
            trainers.kill(random_.randrange(world_size))
            time.sleep(random_.uniform(0.0, 0.05))
        trainers.kill()
        chain.look()
    assert chain.newest is not None
    chain.finish(2, chain.next_step + 3)
    job.stop_keeper()


def test_random_kills(job: Survival, digests: list[str]) -> None:
    _random_kills(job, digests, 10, 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(1, 21))
def test_many_random_kills(job: Survival, digests: list[str], seed: int) -> None:
    _random_kills(job, digests, 10, seed)


def test_keepers_are_killed_under_trainers(
    job: Survival, digests: list[str], tmp_path: Path
) -> None:
    """They notice nothing: the slots are adopted, a flush under way is done by the next keeper."""
    steps, pids, pause = 60, set(), tmp_path / "pause"
    run = job.run(steps, pause=pause, keep=100)
    with job.attempt(2, run) as trainers:
        trainers.wait_saved(3)
        with job.held("writing") as wait_there:
            wait_there(0, 1)
            pids.add(job.keeper())
            job.kill(job.keeper())
            trainers.wait_saved(10)
            pause.touch()
        trainers.wait_for(lambda: 5 in job.durable())
        pids.add(job.keeper())
        job.kill(job.supervisor())
        eventually(lambda: len(list(processes_of(job.place))) == 2)
        job.kill(job.supervisor(), job.keeper())  # nobody is left who could start one
        pause.unlink()
        trainers.wait_saved(max(trainers.told("saved")) + 5)
        pause.touch()
        job.start_keeper()
        pids.add(job.keeper())
        pause.unlink()
        told = trainers.finish()
        assert told["final"] == digests[steps]
        assert told["taken"] + told["skipped_steps"] == steps + 1
        assert told["skipped_steps"] <= 5, [
            line["skipped"] for line in trainers.lines() if line.get("skipped")
        ]
        assert not trainers.told("warning")
    assert len(pids) == 3
    assert job.durable()[-1] > 50
    job.assert_undamaged()
    job.stop_keeper()


@pytest.mark.parametrize(
    ("point", "durable"),
    [
        ("sealed", None),
        pytest.param("ordered", None, marks=pytest.mark.slow),
        ("ordered", 4),
    ],
)
def test_a_job_that_was_killed_gets_its_checkpoint(
    tmp_path: Path, digests: list[str], point: str, durable: int | None
) -> None:
    """Without any trainer, also by a keeper that takes the place of one that was killed.

    Meanwhile the directory belongs to the job: other jobs may not write, its own next one may.
    """
    step = 5 if durable is None else durable
    every = 5 if durable is None else None
    with survival(tmp_path) as job:
        chain = Chain(job, digests)
        with job.held("committing") as wait_there:
            chain.begin(
                2,
                *(Stop(rank, point, step) for rank in range(2)),
                durable_every=every,
                durable=() if durable is None else (durable,),
            )
            chain.trainers.wait_stopped()
            chain.look()
            assert chain.newest == StepId(1, step)
            wait_there(0)
            if point == "ordered":
                job.kill(job.keeper())
                eventually(lambda: job.status()["flushes"]["running"])
            assert not job.durable()
            with pytest.raises(DirectoryInUseError):
                Checkpointer(job.root).load(State(model=torch.nn.Linear(2, 2)))
            if durable is not None:
                chain.begin(2, Stop(0, "told", 8), durable_every=1000)
                chain.trainers.wait_stopped()
                chain.look()
        eventually(lambda: step in job.durable(), 60)
        job.assert_undamaged()
        job.stop_keeper()
        with DirectoryLock(job.root):
            assert chain.newest is not None
        assert job.durable()[-1] == chain.newest.step
