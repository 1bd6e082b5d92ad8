"""Runs a config on Ray: in a cluster that exists, or on a Ray of the run's own on this host."""

import contextlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from everstep.checkpoint.errors import EverstepError
from everstep.cluster import exit_codes
from everstep.cluster.driver import ClusterDriver, PlacingAbandoned, Waiting
from everstep.cluster.keepers import keeper_options
from everstep.cluster.ray_cluster import RayCluster, join
from everstep.cluster.ray_driver import RAY_LOG_NAME, RayDriver
from everstep.cluster.ray_nodes import NodePlan, OwnRay
from everstep.cluster.run import run_controlled, say
from everstep.cluster.run_dir import RunDir
from everstep.cluster.stop_signals import StopSignals
from everstep.trainer.config import LaunchConfig, RunConfig


class OwnCluster(RayCluster):
    """The cluster of an ``OwnRay``, which ends when it is left."""

    def __init__(self, ray: OwnRay) -> None:
        super().__init__(ray.address)
        self._ray = ray

    def failure(self) -> str | None:
        """Why the Ray of this run ended; None = it runs."""
        return self._ray.failure()

    def leave(self) -> None:
        """Leave it and end it."""
        super().leave()
        self._ray.close()


def run_on_own_ray(
    config: RunConfig,
    run_dir: Path,
    resume: str,
    world_size: int,
    console: Console,
    *,
    gpus: Sequence[str] = (),
    launch: Sequence[str] = (),
) -> int:
    """Start Ray on this host, run all ranks there, end it; returns the exit code.

    ``gpus`` are the GPUs to train on, as CUDA_VISIBLE_DEVICES names them; none = on the CPU.
    """
    nodes = own_nodes(world_size, config.launch, gpus)
    started: list[RayCluster] = []

    def open_driver(prepared: RunDir) -> ClusterDriver:
        def open_cluster(waiting: Waiting) -> RayCluster:
            started.append(_start_own(nodes, prepared.logs / RAY_LOG_NAME, waiting))
            return started[0]

        return _driver(open_cluster, prepared, config, on_gpus=bool(gpus))

    code = run_controlled(config, run_dir, resume, world_size, console, open_driver, launch=launch)
    return _end_if_stuck(code, started)


def run_in_cluster(
    config: RunConfig,
    run_dir: Path,
    resume: str,
    address: str,
    console: Console,
    *,
    plan: Callable[[int], tuple[int, str]],
    launch: Sequence[str] = (),
) -> int:
    """Join the cluster at ``address``, run all ranks there, leave it; returns the exit code.

    ``plan`` is told how many GPUs the cluster has; it returns the number of ranks and their device
    ('cpu' or 'cuda'), or raises ConfigError.
    """
    try:
        cluster = _join(address, console)
    except PlacingAbandoned:
        return exit_codes.INTERRUPTED
    except EverstepError as error:
        say(Console(stderr=True), f"error: {error}")
        return exit_codes.of_error(type(error).__name__)
    with cluster:
        world_size, device = plan(cluster.gpus())
        code = run_controlled(
            config,
            run_dir,
            resume,
            world_size,
            console,
            lambda prepared: _driver(lambda _: cluster, prepared, config, on_gpus=device == "cuda"),
            launch=launch,
        )
    return _end_if_stuck(code, [cluster])


def own_nodes(world_size: int, launch: LaunchConfig, gpus: Sequence[str]) -> list[NodePlan]:
    """Nodes of a Ray of the run's own: just enough for the ranks, evenly over all of them."""
    count = min(launch.simulated_nodes, world_size)
    nodes: list[NodePlan] = []
    for index in range(count):
        first, end = world_size * index // count, world_size * (index + 1) // count
        amounts = launch.resources_per_rank.items()
        nodes.append(
            NodePlan(
                cpus=max(1, math.ceil((end - first) * launch.cpus_per_rank)),
                gpus=tuple(gpus[first:end]),
                resources={name: amount * (end - first) for name, amount in amounts},
            )
        )
    return nodes


def _end_if_stuck(code: int, clusters: Sequence[RayCluster]) -> int:
    """The exit code; where threads of Ray hang, the interpreter's own way to end might, too."""
    if not all(cluster.left for cluster in clusters):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code


def _driver(
    open_cluster: Callable[[Waiting], RayCluster],
    prepared: RunDir,
    config: RunConfig,
    *,
    on_gpus: bool,
) -> ClusterDriver:
    return RayDriver(
        open_cluster,
        prepared.path,
        name=config.name,
        launch=config.launch,
        gpus_per_rank=int(on_gpus),
        threads=config.parallel.threads,
        keepers=keeper_options(config),
    )


def _join(address: str, console: Console) -> RayCluster:
    """Join while Ctrl-C still ends everything at once."""
    with StopSignals() as signals:
        said: set[str] = set()

        def waiting(text: str) -> None:
            if text not in said:
                say(console, text)
                said.add(text)
            if signals.take():
                raise PlacingAbandoned

        return join(address, waiting)


def _start_own(nodes: Sequence[NodePlan], log: Path, waiting: Waiting) -> RayCluster:
    ray = OwnRay(nodes, log)
    try:
        ray.start(waiting)
        os.environ.update(ray.environment)
        join(ray.address, waiting)
    except BaseException:
        ray.close()
        raise
    return OwnCluster(ray)
