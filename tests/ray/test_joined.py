"""everstep train in a Ray cluster of several nodes that exists, through the command line."""

import json
import os
import re
import signal
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from everstep.cluster.ray_cluster import RayCluster
from everstep.cluster.ray_nodes import NodePlan, OwnRay
from everstep.cluster.shared_dir import wait_for_ranks
from tests.support import cli
from tests.support.ray_cluster import ray_cluster

pytestmark = [pytest.mark.ray, pytest.mark.multiproc, pytest.mark.timeout(600)]
SHORT = ("train.steps=24", "checkpoint.every_steps=4", "mesh.tp=1")
SPREAD = "launch.placement=spread"


def command(nodes: OwnRay, run_dir: str, *more: str) -> list[str]:
    """A short run on the nodes."""
    return ["train", "run.yaml", "--run-dir", run_dir, "--address", nodes.address, *more]


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def actor_of_rank(run_dir: Path, rank: int) -> int:
    """The process of a rank's actor: it keeps the process that the rank was forked from."""
    pid = [event["pid"] for event in events(run_dir, "started") if event["rank"] == rank][-1]
    return parent(parent(pid))


def until_step(run: cli.Command, run_dir: Path, step: int) -> None:
    assert cli.wait_until(
        lambda: (
            run.process.poll() is not None
            or any(line["step"] >= step for line in cli.metrics(run_dir))
        )
    ), run.output
    assert run.process.poll() is None, run.output


def assert_clean(joined: RayCluster, run_dir: Path, cpus: int = 6) -> None:
    """Nothing of a run is left in the cluster: no rank, no actor, no reservation."""
    assert wait_for_ranks(run_dir, 10)
    assert cli.wait_until(lambda: joined.free().get("CPU") == cpus, 20), joined.free()


def assert_scraped(joined: RayCluster, name: str) -> None:
    """The nodes serve all numbers of the run."""
    import ray

    texts: list[str] = []

    def found() -> bool:
        texts.clear()
        for node in ray.nodes():
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            with urllib.request.urlopen(url, timeout=10) as answer:
                texts.append(answer.read().decode())
        text = "\n".join(texts)
        return all(
            re.search(rf'ray_everstep_{metric}{{[^}}]*run="{name}"[^}}]*}} [0-9.e-]+', text)
            for metric in ("step", "loss", "tokens_per_second", "step_time_seconds")
        )

    assert cli.wait_until(found, 60), [re.findall("ray_everstep.*", text) for text in texts]


@pytest.mark.slow
def test_killed_twice_it_goes_on_bit_for_bit(
    ray_nodes: OwnRay, joined_ray: RayCluster, small_run: Path
) -> None:
    """SIGKILL of the command, then of an actor, which starts again: as if nothing had happened."""
    code, output = cli.run("train", "run.yaml", "--run-dir", "straight", *SHORT, cwd=small_run)
    assert code == 0, output
    run_dir = small_run / "killed"
    arguments = command(ray_nodes, "killed", SPREAD, *SHORT, "checkpoint.keeper_linger_s=8")
    variables = ray_nodes.environment

    with cli.command(*arguments, cwd=small_run, variables=variables) as run:
        until_step(run, run_dir, 6)
        run.process.kill()
        run.assert_nothing_left()
    assert_clean(joined_ray, run_dir)

    with cli.command(*arguments, cwd=small_run, variables=variables) as run:
        until_step(run, run_dir, 14)
        os.kill(actor_of_rank(run_dir, 1), signal.SIGKILL)
        assert run.wait() == 0, run.output
        run.assert_nothing_left()
        assert "rank 1 was killed (SIGKILL): starting all ranks again" in run.output
        assert "(raylet)" not in run.output
    (restart,) = events(run_dir, "restart")
    assert (restart["attempt"], restart["restart"]) == (1, 1)
    assert len(events(run_dir, "resumed")) == 2
    assert_clean(joined_ray, run_dir)
    assert cli.losses(run_dir) == cli.losses(small_run / "straight")
    assert cli.final_bytes(run_dir) == cli.final_bytes(small_run / "straight")

    placement = events(run_dir, "placement")[-1]
    assert [seat["local_rank"] for seat in placement["seats"]] == [0, 1]
    assert {seat["node"] for seat in placement["seats"]} == set(ray_nodes.raylets)
    assert not (run_dir / ".token").exists()
    assert [log.name for log in sorted((run_dir / "logs").glob("rank-*"))] == [
        "rank-00000.log",
        "rank-00001.log",
    ]


@pytest.mark.slow
def test_prometheus_sees_it_and_asked_to_stop_it_saves(
    ray_nodes: OwnRay, joined_ray: RayCluster, small_run: Path
) -> None:
    more = ("train.steps=100000", "mesh.tp=1", "train.eval_every=0")
    label = "launch.failure_domain_label=rack"
    arguments = command(ray_nodes, "r", *more, label, "launch.resources_per_rank={second: 1}")
    with cli.command(*arguments, cwd=small_run, variables=ray_nodes.environment) as run:
        until_step(run, small_run / "r", 2)
        assert_scraped(joined_ray, "small")
        run.interrupt()
        assert run.wait() == 75, run.output
        run.assert_nothing_left()
        assert "to go on from step " in run.output
    assert_clean(joined_ray, small_run / "r")
    (placement,) = events(small_run / "r", "placement")
    assert [seat["failure_domain"] for seat in placement["seats"]] == ["b", "b"]


@pytest.mark.parametrize(
    ("more", "code", "sentence"),
    [
        (
            ["launch.cpus_per_rank=2"],
            1,
            "the Ray cluster is too small for 4 ranks of 2 CPU each: it holds 2 (its 2 nodes: "
            "3 CPU; 3 CPU)",
        ),
        pytest.param(
            ["launch.resources_per_rank={gold: 1}", "launch.placement=strict_spread"],
            1,
            "of 1 CPU, 1 gold each with launch.placement=strict_spread: it holds 0",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["parallel.device=cuda"],
            2,
            "needs a GPU for each, but the Ray cluster has 0",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_the_cluster_cannot_hold(
    ray_nodes: OwnRay, small_run: Path, more: Sequence[str], code: int, sentence: str
) -> None:
    arguments = [*command(ray_nodes, "r")[:6], *more]
    got, output = cli.run(*arguments, cwd=small_run, variables=ray_nodes.environment)
    assert got == code, output
    assert sentence in output.partition("error: ")[2]
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_busy_cluster_is_waited_for(
    ray_nodes: OwnRay, joined_ray: RayCluster, small_run: Path
) -> None:
    from ray.util.placement_group import placement_group, remove_placement_group

    taken = placement_group([{"CPU": 3}, {"CPU": 2}], strategy="SPREAD")
    try:
        assert taken.wait(20)
        few = ("launch.place_timeout_s=4", "train.steps=2")
        arguments = command(ray_nodes, "r", *few)
        got, output = cli.run(*arguments, cwd=small_run, variables=ray_nodes.environment)
    finally:
        remove_placement_group(taken)
    assert got == 1, output
    assert "\nwaiting for room in the Ray cluster: 4 CPU needed, 1 CPU free now\n" in output
    assert "it did not get free within launch.place_timeout_s=4 seconds" in output
    assert_clean(joined_ray, small_run / "r")


def test_an_address_where_nobody_answers(small_run: Path) -> None:
    code, output = cli.run("train", "run.yaml", "--address", "127.0.0.1:1", cwd=small_run)
    assert code == 1
    assert "error: no Ray cluster answers at 127.0.0.1:1 (Connection refused)" in output
    assert not (small_run / "runs").exists()


@pytest.mark.slow
def test_an_address_where_something_else_listens(small_run: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        code, output = cli.run("train", "run.yaml", "--address", address, cwd=small_run)
    assert code == 1
    assert f"error: what listens at {address} does not answer as Ray within 15 s" in output


@pytest.mark.slow
@pytest.mark.chaos
def test_a_node_that_dies_is_named_and_replaced(small_run: Path, tmp_path: Path) -> None:
    """The command runs on the head; the node of ranks 2 and 3 is killed, another one has room."""
    nodes = (NodePlan(cpus=2), NodePlan(cpus=2), NodePlan(cpus=2))
    arguments = ["train", "run.yaml", "--run-dir", "straight", *SHORT, "mesh.tp=2"]
    code, output = cli.run(*arguments, cwd=small_run)
    assert code == 0, output
    run_dir = small_run / "r"
    with ray_cluster(tmp_path / "ray.log", nodes) as started:
        arguments = command(started, "r", *SHORT, "mesh.tp=2")
        with cli.command(*arguments, cwd=small_run, variables=started.environment) as run:
            until_step(run, run_dir, 6)
            seats = events(run_dir, "placement")[-1]["seats"]
            head = next(iter(started.raylets))
            victim = next(seat["node"] for seat in seats if seat["node"] != head)
            lost = [rank for rank, seat in enumerate(seats) if seat["node"] == victim]
            os.kill(started.raylets[victim], signal.SIGKILL)
            assert run.wait() == 0, run.output
            run.assert_nothing_left()
        ranks = f"{lost[0]}-{lost[1]}"
        assert re.search(
            rf"ranks {ranks} went down with node .*Ray node {victim[:8]}\), which died or was cut "
            "off: starting all ranks again",
            run.output,
        ), run.output
        assert wait_for_ranks(run_dir, 10)
        assert victim not in {seat["node"] for seat in events(run_dir, "placement")[-1]["seats"]}
    assert cli.losses(run_dir) == cli.losses(small_run / "straight")
    assert cli.final_bytes(run_dir) == cli.final_bytes(small_run / "straight")
