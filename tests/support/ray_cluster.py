"""A real Ray cluster of several nodes on this host, for tests; it touches no other Ray here."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from everstep.cluster.ray_nodes import NodePlan, OwnRay

TWO_NODES = (
    NodePlan(cpus=3, labels={"rack": "a"}),
    NodePlan(cpus=3, labels={"rack": "b"}, resources={"second": 4}),
)


@contextmanager
def ray_cluster(
    log: Path, nodes: Sequence[NodePlan] = TWO_NODES, *, dashboard: bool = False
) -> Iterator[OwnRay]:
    """Start the nodes, and end them with all that they run.

    ``address`` is what to join; commands need ``environment`` to be let in. ``raylets`` are the
    processes of the nodes, by id: killing one kills its node. With ``dashboard``,
    ``dashboard_url`` takes jobs.
    """
    root = str(Path(__file__).resolve().parents[2])  # jobs run elsewhere, with this everstep
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    ray = OwnRay(nodes, log, dashboard=dashboard, token=False)  # this process may join, too
    try:
        with variables({"PYTHONPATH": path}):
            ray.start()
        yield ray
    finally:
        ray.close()


@contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables of this process, for as long as it lasts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
