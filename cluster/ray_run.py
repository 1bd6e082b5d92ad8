"""Runs a config on Ray: in a cluster that exists, or on a Ray of the run's own on this host."""

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from everstep.checkpoint.errors import EverstepError
from everstep.cluster import exit_codes
from everstep.cluster.controller import run_controlled, say
from everstep.cluster.driver import ClusterDriver, PlacingAbandoned, Waiting
from everstep.cluster.local_driver import DEFAULT_PRELOAD, DEFAULT_TARGET
from everstep.cluster.ray_cluster import RayCluster, join
from everstep.cluster.ray_driver import RayDriver
from everstep.cluster.ray_nodes import NodePlan, OwnRay
from everstep.cluster.run_dir import RunDir
from everstep.cluster.stop_signals import StopSignals
from everstep.trainer.config import LaunchConfig, RunConfig
from everstep.trainer.mesh_shape import check_config, local_device, resolve_mesh, world_size_of


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


def run_ray(
    config: RunConfig,
    run_dir: Path,
    resume: str,
    nproc: int | None,
    console: Console,
    *,
    address: str | None,
    host_gpus: Sequence[str] = (),
    error_console: Console | None = None,
    target: str = DEFAULT_TARGET,
    preload: Sequence[str] = DEFAULT_PRELOAD,
    store: bool = True,
    launch: Sequence[str] = (),
) -> int:
    """Run all ranks as actors of Ray, and return the exit code (``exit_codes.py``).

    Args:
        nproc: number of ranks; None = what the mesh asks for, or what fills the GPUs.
        address: cluster to join; None = start Ray on this host, and end it again.
        host_gpus: names of this host's GPUs as in CUDA_VISIBLE_DEVICES; for a Ray of our own.
    """
    errors = error_console or Console(stderr=True)
    with ExitStack() as stack:
        try:
            joined = None
            if address is not None:
                joined = stack.enter_context(_join(address, console))
            gpus = len(host_gpus) if joined is None else joined.gpus()
            where = "this host" if joined is None else "the Ray cluster"
            world_size = world_size_of(config.mesh, nproc, gpus)
            check_config(config, resolve_mesh(config.mesh, world_size))
            device = local_device(config.parallel.device, gpus, world_size, where)
        except EverstepError as error:
            say(errors, f"error: {error}")
            return exit_codes.of_error(type(error).__name__)
        except PlacingAbandoned:
            return exit_codes.INTERRUPTED
        if gpus and config.parallel.device == "auto" and device == "cpu":
            say(
                console,
                f"training on the CPU: each of the {world_size} ranks needs a GPU of its own, and "
                f"{where} has {gpus}",
            )

        def open_driver(prepared: RunDir) -> ClusterDriver:
            def open_cluster(waiting: Waiting) -> RayCluster:
                if joined is not None:
                    return joined
                visible = host_gpus if device == "cuda" else ()
                nodes = own_nodes(world_size, config.launch, visible)
                return _start_own(nodes, prepared.logs / "ray.log", waiting)

            return RayDriver(
                open_cluster,
                prepared.path,
                name=config.name,
                launch=config.launch,
                gpus_per_rank=int(device == "cuda"),
                threads=config.parallel.threads,
                target=target,
                preload=preload,
                store=store,
            )

        return run_controlled(
            config,
            run_dir,
            resume,
            world_size,
            console,
            open_driver,
            error_console=errors,
            launch=launch,
        )


def ray_address(launch: LaunchConfig, environment: Mapping[str, str]) -> str | None:
    """The cluster to join, from the config or else RAY_ADDRESS; None = a Ray of the run's own."""
    address = launch.address or environment.get("RAY_ADDRESS") or "local"
    return None if address == "local" else address


def own_nodes(world_size: int, launch: LaunchConfig, gpus: Sequence[str]) -> list[NodePlan]:
    """Nodes of a Ray of the run's own: just enough for the ranks, evenly over all of them."""
    count = min(launch.simulated_nodes, world_size)
    nodes: list[NodePlan] = []
    for index in range(count):
        ranks = world_size * (index + 1) // count - world_size * index // count
        first = sum(len(node.gpus) for node in nodes)
        nodes.append(
            NodePlan(
                cpus=max(1, math.ceil(ranks * launch.cpus_per_rank)),
                gpus=tuple(gpus[first : first + ranks]),
                resources={
                    name: amount * ranks for name, amount in launch.resources_per_rank.items()
                },
            )
        )
    return nodes


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
