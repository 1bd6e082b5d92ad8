"""The controller with ranks in memory; its decisions are tested in test_lifecycle.py."""

import io
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from rich.console import Console

from everstep.cluster.closing import Outcome
from everstep.cluster.controller import Controller
from everstep.cluster.driver import (
    Broken,
    Placement,
    RankExit,
    Reported,
    Waiting,
    wait_silently,
)
from everstep.cluster.errors import LaunchError
from everstep.cluster.lifecycle import Job, StopAsked
from everstep.cluster.log_tail import LogTail
from everstep.cluster.stop_signals import StopSignals
from everstep.trainer.events import EventLog
from everstep.trainer.progress import ProgressView
from everstep.trainer.rank_spec import Report
from tests.support.fake_driver import InMemoryDriver, specs_for

CTRL_C = StopAsked("Ctrl-C", insistent=True)


class ScriptedSignals(StopSignals):
    """Asks to stop when a test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: list[StopAsked] = []

    def take(self) -> list[StopAsked]:
        taken, self.queue = self.queue[:1], self.queue[1:]
        return taken


@dataclass
class Bench:
    """A controller, and all that it talks to."""

    folder: Path
    worker: str
    ranks: int = 2
    grace_s: float = 20.0
    max_restarts: int = 0
    drill_kill_step: int = 0

    def __post_init__(self) -> None:
        self.driver = InMemoryDriver(f"tests.support.fake_workers:{self.worker}")
        self.signals = ScriptedSignals()
        self.output = io.StringIO()

    def run(self) -> Outcome:
        console = Console(file=self.output, width=100)
        job = Job(
            world_size=self.ranks,
            grace_s=self.grace_s,
            start_by_s=time.monotonic() + 20,
            max_restarts=self.max_restarts,
        )
        logs = {rank: self.folder / f"{rank}.log" for rank in range(self.ranks)}
        with (
            EventLog(self.folder / "events.jsonl") as events,
            ProgressView(console, "test") as view,
        ):
            controller = Controller(
                self.driver,
                job,
                view=view,
                events=events,
                tail=LogTail(logs, self.ranks),
                signals=self.signals,
                drill_kill_step=self.drill_kill_step,
            )
            return controller.run(
                lambda placement: [replace(spec, resume="5") for spec in specs_for(placement)]
            )

    def events(self) -> list[Report]:
        lines = (self.folder / "events.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def test_a_run_to_its_end(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "train")
    outcome = bench.run()
    assert outcome == Outcome(exit_code=0, step=20, saved_step=20)
    assert bench.driver.calls == []
    assert bench.driver.ended_keepers
    assert {event["rank"] for event in bench.events() if event["kind"] == "done"} == {0, 1}
    reasons = [event["reason"] for event in bench.events() if event["kind"] == "state"]
    assert reasons == ["all 2 ranks run", "all done"]


def test_asked_to_stop(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "train_long")
    asked = threading.Timer(0.3, lambda: bench.signals.queue.append(CTRL_C))
    asked.start()
    outcome = bench.run()
    asked.join()
    assert outcome.exit_code == 75
    assert outcome.saved_step == outcome.step
    assert bench.driver.calls == ["ask_stop"]
    assert "Ctrl-C: finishing the step and saving, in at most 20 s" in bench.output.getvalue()


def test_ranks_that_do_not_stop_in_time(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "hang_at_stop", grace_s=0.2)
    asked = threading.Timer(0.3, lambda: bench.signals.queue.append(CTRL_C))
    asked.start()
    outcome = bench.run()
    asked.join()
    assert outcome.exit_code == 1
    assert outcome.cause is None
    assert outcome.failure is not None
    assert "ranks 0-1 did not finish" in outcome.failure
    assert bench.driver.calls == ["ask_stop", "dump_stacks", "kill"]


def test_the_first_failure_ends_all_ranks(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "rank_1_raises", ranks=3)
    outcome = bench.run()
    assert outcome.exit_code == 1
    assert outcome.cause is not None
    assert (outcome.cause.rank, outcome.cause.alike, outcome.cause.others) == (1, (), ())
    assert bench.driver.calls == ["kill"]


def test_a_lost_peer_is_not_the_cause(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "rank_1_raises")
    gloo = {"kind": "error", "type": "RuntimeError", "message": "gloo: Connection closed by peer"}
    bench.driver.tell(Reported(0, {**gloo, "deliberate": False, "time": 0.0}))
    outcome = bench.run()
    assert outcome.cause is not None
    assert outcome.cause.sentence == "rank 1 failed with ValueError: boom"


def test_all_ranks_start_again_when_one_was_killed(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "dies_once", ranks=3, max_restarts=2)
    assert bench.run() == Outcome(exit_code=0, step=20, saved_step=20)
    assert bench.driver.calls == ["kill", "renew"]
    assert (
        "rank 1 was killed (SIGKILL): starting all ranks again from the newest saved step, restart "
        "1 of 2"
    ) in bench.output.getvalue().replace("\n", " ")
    seen = [event for event in bench.events() if event["kind"] == "seen"]
    assert {(event["attempt"], event["resume"]) for event in seen} == {(0, "5"), (1, "auto")}
    (restart,) = [event for event in bench.events() if event["kind"] == "restart"]
    assert (restart["attempt"], restart["restart"]) == (1, 1)
    assert restart["reason"].startswith("rank 1 was killed")
    states = [event["state"] for event in bench.events() if event["kind"] == "state"]
    assert states == ["running", "failing", "restarting", "starting", "running", "done"]


def test_what_was_asked_for_is_resumed_until_something_is_saved(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "dies_always", max_restarts=1)
    outcome = bench.run()
    assert outcome.exit_code == 1
    assert outcome.not_again is not None
    assert "launch.max_restarts=1" in outcome.not_again
    assert bench.driver.calls == ["kill", "renew", "kill"]
    assert [spec.resume for spec in bench.driver.specs] == ["5"] * 4


def test_errors_that_a_rank_raised_are_not_tried_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "rank_1_raises", max_restarts=3)
    outcome = bench.run()
    assert outcome.not_again == "an error that a rank raised itself would come again"
    assert bench.driver.ended_keepers  # they hold nothing


def test_what_keepers_hold_outlives_a_run_that_failed(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "rank_1_raises")
    bench.driver.tell(Reported(0, {"kind": "step", "step": 7, "steps": 9, "sealed": 6}))
    assert bench.run().sealed_step == 6
    assert not bench.driver.ended_keepers
    assert bench.driver.calls == ["kill"]


def test_a_drill_kills_all_ranks_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "train", max_restarts=1, drill_kill_step=5)
    assert bench.run() == Outcome(exit_code=0, step=20, saved_step=20)
    assert bench.driver.calls == ["kill", "renew"]
    assert "drill: step 5 is done" in bench.output.getvalue()
    assert "all ranks were killed (SIGKILL): starting" in bench.output.getvalue()


class NoPlaceAgain(InMemoryDriver):
    """Can start ranks once only."""

    def __init__(self, patient: bool) -> None:
        super().__init__("tests.support.fake_workers:dies_always")
        self.patient = patient

    def renew(self, waiting: Waiting = wait_silently) -> Placement:
        while self.patient:
            waiting("waiting for room")
            time.sleep(0.01)
        raise LaunchError("the cluster is too small now")


def test_a_place_that_is_gone_ends_the_run(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "dies_always", max_restarts=3)
    bench.driver = NoPlaceAgain(patient=False)
    outcome = bench.run()
    assert (outcome.exit_code, outcome.failure) == (1, "the cluster is too small now")


def test_asked_to_stop_while_starting_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "dies_always", max_restarts=3)
    bench.driver = NoPlaceAgain(patient=True)
    asked = threading.Timer(1.0, lambda: bench.signals.queue.append(CTRL_C))
    asked.start()
    assert bench.run() == Outcome(exit_code=75)
    asked.join()
    assert [event["state"] for event in bench.events() if event["kind"] == "state"][-2:] == [
        "restarting",
        "stopped",
    ]


class SlowToPlace(InMemoryDriver):
    """Waits for room until it is asked to stop, or the room is there."""

    def __init__(self, room_after: int) -> None:
        super().__init__("tests.support.fake_workers:train")
        self.room_after = room_after

    def place(self, world_size: int, waiting: Waiting = wait_silently) -> Placement:
        for _ in range(self.room_after):
            waiting("waiting for room")
        return super().place(world_size)


def test_waiting_for_a_place_is_shown_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "train")
    bench.driver = SlowToPlace(room_after=3)
    assert bench.run().exit_code == 0
    assert bench.output.getvalue().count("waiting for room") == 1
    (placement,) = [event for event in bench.events() if event["kind"] == "placement"]
    assert [seat["local_rank"] for seat in placement["seats"]] == [0, 1]


def test_asked_to_stop_while_waiting_for_a_place(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "train")
    bench.driver = SlowToPlace(room_after=10**9)
    bench.signals.queue = [CTRL_C]
    assert bench.run() == Outcome(exit_code=75)
    states = [event["state"] for event in bench.events() if event["kind"] == "state"]
    assert states == ["stopped"]


def test_a_broken_driver_ends_the_run(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "hang_at_stop")
    bench.driver.tell(Broken("the machine room is on fire"))
    outcome = bench.run()
    assert (outcome.exit_code, outcome.failure) == (1, "the machine room is on fire")
    assert bench.driver.calls == ["kill"]


def test_messages_that_others_repeat_are_shown_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "hang_at_stop", ranks=1)
    for rank, text in [(0, "hello"), (0, "hello"), (1, "hello"), (1, "mine"), (2, "mine")]:
        bench.driver.tell(Reported(rank, {"kind": "message", "text": text}))
    bench.driver.tell(RankExit(rank=0, code=0, time_s=0))
    bench.run()
    assert bench.output.getvalue().splitlines()[:3] == ["hello", "hello", "[rank 1] mine"]


@pytest.fixture(autouse=True)
def no_rank_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rank ")]
