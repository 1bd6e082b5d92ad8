"""The actors that keep ranks in a Ray cluster, as the controller makes and ends them."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from everstep.cluster.ray_cluster import within

KILL_S = 2.0
"""Longest time that ending something in the cluster may take."""


def actor_class() -> Any:
    """The actor: a shell around RankHost, sent by value: a node needs nothing to load it."""
    import ray

    class Rank:
        def __init__(
            self, path: list[str], setup: Mapping[str, Any], spec: Mapping[str, Any]
        ) -> None:
            import os
            import sys

            # What the command imports is found in the same order here, where this node has it.
            here = [entry for entry in path if os.path.exists(entry)]
            sys.path[:] = [*here, *(entry for entry in sys.path if entry not in here)]
            from everstep.cluster.ray_worker import RankHost

            self._host = RankHost(setup, spec)

        @ray.method(concurrency_group="train")
        def run(self) -> None:
            self._host.run()

        @ray.method(concurrency_group="control")
        def take(self, seen: int, wait_s: float) -> list[str]:
            return self._host.take(seen, wait_s)

        @ray.method(concurrency_group="control")
        def end_keeper(self, job: str, timeout_s: float) -> list[str]:
            return self._host.end_keeper(job, timeout_s)

        @ray.method(concurrency_group="control")
        def ask(self, what: str) -> None:
            self._host.ask(what)

    groups: dict[str, Any] = {"concurrency_groups": {"train": 1, "control": 4}}
    return ray.remote(**groups)(Rank)


def kill_actors(actors: Sequence[Any]) -> None:
    """End actors of ranks, also those that have not begun; never waits long."""
    import ray

    def kill() -> None:
        for actor in actors:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(actor, no_restart=True)

    if within(KILL_S, kill):
        return
    for actor in actors:  # without the cluster's head, actors can still be reached themselves
        with contextlib.suppress(ray.exceptions.RayError):
            actor.ask.remote("end")
