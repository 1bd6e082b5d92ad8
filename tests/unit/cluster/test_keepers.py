"""Which keepers a run has, and that they are started with its ranks and end with it."""

from dataclasses import replace
from pathlib import Path

import pytest

from everstep.checkpoint.keeper import control
from everstep.cluster.driver import Seat
from everstep.cluster.keepers import (
    KeeperOptions,
    base_job,
    end_keepers,
    keeper_names,
    keeper_options,
    keeper_runs,
    run_status,
)
from everstep.cluster.local_driver import LocalDriver
from everstep.trainer.config import RunConfig
from everstep.trainer.config_load import load_config
from tests.support.fake_driver import specs_for

TEST_OPTIONS = KeeperOptions(budget_bytes=2**20, linger_s=60.0, interface=None)


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def config(*overrides: str) -> RunConfig:
    return load_config("debug_dp2", overrides)


def seat(host: str, node: str | None) -> Seat:
    return Seat(host=host, node=node, local_rank=0, local_world_size=1)


@pytest.mark.parametrize(
    ("places", "names"),
    [
        ([("a", None), ("a", None)], ["run", "run"]),
        ([("a", "1"), ("a", "1"), ("b", "2")], ["run", "run", "run"]),
        ([("a", "9"), ("a", "9"), ("a", "3"), ("b", "7")], ["run-n0", "run-n0", "run-n1", "run"]),
    ],
    ids=["one host", "a host each", "two nodes of one host"],
)
def test_every_node_has_one(places: list[tuple[str, str | None]], names: list[str]) -> None:
    seats = [seat(*place) for place in places]
    assert keeper_names("run", seats) == names
    assert keeper_names(None, seats) == [None] * len(seats)


def test_a_run_is_found_again_by_where_its_checkpoints_are(tmp_path: Path) -> None:
    here = base_job(config(), tmp_path / "r")
    assert here is not None
    assert here == base_job(config("checkpoint.every_steps=7"), tmp_path / "x" / ".." / "r")
    assert here != base_job(config(), tmp_path / "other")
    shared = config("checkpoint.directory=s3://bucket/a")
    assert base_job(shared, tmp_path / "r") == base_job(shared, tmp_path / "other")
    assert base_job(config("checkpoint.memory=process"), tmp_path / "r") is None


def test_options_are_those_of_the_config() -> None:
    asked = (
        "checkpoint.memory_budget_bytes=1048576",
        "checkpoint.keeper_linger_s=5",
        "checkpoint.keeper_interface=eth0",
    )
    assert keeper_options(config(*asked)) == KeeperOptions(
        budget_bytes=2**20, linger_s=5.0, interface="eth0"
    )


def test_a_driver_starts_and_ends_the_keepers_of_its_ranks(tmp_path: Path) -> None:
    job = base_job(config(), tmp_path / "r")
    assert job is not None
    driver = LocalDriver(
        tmp_path,
        target="tests.support.fake_workers:train",
        preload=[],
        store_port=None,
        keep=TEST_OPTIONS.keep,
    )
    try:
        specs = specs_for(driver.place(2))
        driver.start([replace(spec, keeper=job) for spec in specs])
        assert keeper_runs(job)
        (status,) = run_status(config(), tmp_path / "r")
        assert (status["job"], status["budget_bytes"]) == (job, 2**20)
        assert driver.end_keepers(20.0) == []
        assert not keeper_runs(job)
        assert driver.end_keepers(20.0) == []
    finally:
        driver.close()
        control.stop(job, now=True)


def test_a_keeper_that_does_not_end_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(job: str, timeout_s: float) -> bool:
        raise OSError(f"{job} is stuck")

    monkeypatch.setattr(control, "stop", refuse)
    assert end_keepers(["a", "b"], 1.0) == ["a is stuck", "b is stuck"]
