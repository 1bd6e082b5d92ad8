"""What all tests of a process share: a Ray cluster, started when the first of them asks for it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from everstep.cluster.ray_cluster import RayCluster
    from everstep.cluster.ray_nodes import OwnRay


@pytest.fixture(scope="session")
def ray_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator["OwnRay"]:
    """Two nodes with three CPUs each, and a dashboard that takes jobs; nobody may kill a node."""
    from tests.support.ray_cluster import ray_cluster

    with ray_cluster(tmp_path_factory.mktemp("ray") / "ray.log", dashboard=True) as started:
        yield started


@pytest.fixture(scope="module")
def joined_ray(ray_nodes: "OwnRay") -> Iterator["RayCluster"]:
    """This process as a driver of ``ray_nodes``; leaving it does nothing until the module ends."""
    from everstep.cluster.ray_cluster import RayCluster, join
    from tests.support.ray_cluster import variables

    class Kept(RayCluster):
        def leave(self) -> None:
            pass

    with variables(ray_nodes.environment), join(ray_nodes.address) as joined:
        yield Kept(joined.address)
