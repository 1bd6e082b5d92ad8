"""The contract of ClusterDriver, for every driver there is."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from everstep.cluster.driver import ClusterDriver, DriverEvent, RankExit, Reported
from everstep.cluster.local_driver import LocalDriver
from everstep.trainer.config import LaunchConfig
from tests.support.fake_driver import InMemoryDriver, specs_for

LIMIT_S = 60.0
Open = Callable[[str], ClusterDriver]


@pytest.fixture(params=["local", "memory", pytest.param("ray", marks=pytest.mark.ray)])
def open_driver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens a driver for a fake worker by its name, and closes it at the end."""
    joined = request.getfixturevalue("joined_ray") if request.param == "ray" else None
    with ExitStack() as stack:

        def open_one(worker: str) -> ClusterDriver:
            target = f"tests.support.fake_workers:{worker}"
            driver: ClusterDriver
            if request.param == "local":
                driver = LocalDriver(tmp_path, target=target, preload=[], store_port=None)
            elif joined is not None:
                from everstep.cluster.ray_driver import RayDriver

                (tmp_path / "logs").mkdir(exist_ok=True)
                driver = RayDriver(
                    lambda _: joined,
                    tmp_path,
                    name="contract",
                    launch=LaunchConfig(),
                    target=target,
                    preload=[],
                    store=False,
                )
            else:
                driver = InMemoryDriver(target)
            stack.callback(driver.close)
            return driver

        yield open_one


def start(driver: ClusterDriver, world_size: int) -> None:
    driver.start(specs_for(driver.place(world_size)))


def until(driver: ClusterDriver, enough: Callable[[list[DriverEvent]], bool]) -> list[DriverEvent]:
    events: list[DriverEvent] = []
    deadline_s = time.monotonic() + LIMIT_S
    while not enough(events):
        assert time.monotonic() < deadline_s, events
        events += driver.poll(0.05)
    return events


def exits(events: list[DriverEvent]) -> dict[int, int]:
    return {event.rank: event.code for event in events if isinstance(event, RankExit)}


def reports(events: list[DriverEvent], rank: int, kind: str) -> list[dict[str, object]]:
    return [
        event.report
        for event in events
        if isinstance(event, Reported) and event.rank == rank and event.report["kind"] == kind
    ]


def all_ended(world_size: int) -> Callable[[list[DriverEvent]], bool]:
    return lambda events: len(exits(events)) == world_size


def all_started(world_size: int) -> Callable[[list[DriverEvent]], bool]:
    return lambda events: all(reports(events, rank, "started") for rank in range(world_size))


def test_a_placement_has_a_seat_for_every_rank(open_driver: Open) -> None:
    placement = open_driver("train").place(3)
    assert [seat.local_rank for seat in placement.seats] == [0, 1, 2]
    assert {seat.local_world_size for seat in placement.seats} == {3}


def test_reports_come_in_order_and_whole_and_the_exit_comes_last(open_driver: Open) -> None:
    driver = open_driver("big_reports")
    start(driver, 2)
    events = until(driver, all_ended(2))
    assert exits(events) == {0: 0, 1: 0}
    for rank in range(2):
        assert len(reports(events, rank, "started")) == 1
        big = reports(events, rank, "big")
        assert [report["number"] for report in big] == list(range(40))
        assert {len(str(report["padding"])) for report in big} == {50_000}
        mine = [event for event in events if getattr(event, "rank", None) == rank]
        assert [isinstance(event, RankExit) for event in mine].index(True) == len(mine) - 1


def test_every_report_names_its_rank(open_driver: Open) -> None:
    driver = open_driver("train")
    start(driver, 2)
    for event in until(driver, all_ended(2)):
        if isinstance(event, Reported):
            assert event.report["rank"] == event.rank


def test_asking_stops_all_ranks(open_driver: Open) -> None:
    driver = open_driver("train_long")
    start(driver, 2)
    before = until(driver, all_started(2))
    driver.ask_stop()
    assert exits(before + until(driver, all_ended(2))) == {0: 75, 1: 75}


def test_asking_before_ranks_are_up_is_not_lost(open_driver: Open) -> None:
    driver = open_driver("train_long")
    start(driver, 2)
    driver.ask_stop()
    assert exits(until(driver, all_ended(2))) == {0: 75, 1: 75}


def test_kill_ends_ranks_that_never_stop(open_driver: Open) -> None:
    driver = open_driver("hang_at_stop")
    start(driver, 2)
    until(driver, all_started(2))
    driver.ask_stop()
    driver.kill()
    assert exits(until(driver, all_ended(2))) == {0: -signal.SIGKILL, 1: -signal.SIGKILL}


def test_kill_right_after_start_ends_all_ranks(open_driver: Open) -> None:
    driver = open_driver("hang_at_stop")
    start(driver, 2)
    driver.kill()
    events = until(driver, all_ended(2))
    assert exits(events) == {0: -signal.SIGKILL, 1: -signal.SIGKILL}
    assert all(isinstance(event, Reported | RankExit) for event in events)


def test_ranks_can_be_started_again_once_all_have_ended(open_driver: Open, tmp_path: Path) -> None:
    driver = open_driver("dies_once")
    specs = specs_for(driver.place(2), str(tmp_path))
    driver.start(specs)
    events = until(driver, lambda events: 1 in exits(events))
    driver.kill()
    events += until(driver, lambda more: len(exits(events + more)) == 2)
    assert exits(events) == {0: -signal.SIGKILL, 1: -signal.SIGKILL}
    placement = driver.renew()
    if (tmp_path / "child").exists():  # ranks of a driver in memory have none
        assert not Path("/proc", (tmp_path / "child").read_text()).exists()
    again = specs_for(placement, str(tmp_path))
    driver.start([replace(spec, attempt=1) for spec in again])
    events = until(driver, all_ended(2))
    assert exits(events) == {0: 0, 1: 0}
    assert reports(events, 0, "saved")


def test_exit_codes_pass_through(open_driver: Open) -> None:
    driver = open_driver("return_3")
    start(driver, 1)
    assert exits(until(driver, all_ended(1))) == {0: 3}


def test_an_error_is_reported_before_the_exit(open_driver: Open) -> None:
    driver = open_driver("rank_1_raises")
    start(driver, 2)
    events = until(driver, lambda events: 1 in exits(events))
    (error,) = reports(events, 1, "error")
    assert (error["type"], error["message"]) == ("ValueError", "boom\nand more about it")
    assert error["deliberate"] is False
    assert exits(events) == {1: 1}


def test_poll_returns_when_nothing_happens(open_driver: Open) -> None:
    driver = open_driver("hang_at_stop")
    start(driver, 1)
    until(driver, all_started(1))
    driver.poll(0.1)
    began_s = time.monotonic()
    assert driver.poll(0.1) == []
    assert time.monotonic() - began_s < 2


def test_close_ends_everything_and_may_come_twice_and_early(open_driver: Open) -> None:
    open_driver("train").close()
    driver = open_driver("hang_at_stop")
    start(driver, 2)
    until(driver, all_started(2))
    driver.close()
    driver.close()
