"""What all tests of a process share, started when the first of them asks for it.

A Ray cluster, an S3 server; and a disk that is soon full.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from everstep.cluster.ray_cluster import RayCluster
    from everstep.cluster.ray_nodes import OwnRay
    from tests.support.s3_server import S3Server

# a busy machine is no defect
settings.register_profile(
    "everstep", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("everstep")
for _name in ("no_proxy", "NO_PROXY"):  # the servers of tests are on this host
    os.environ[_name] = ",".join(filter(None, [os.environ.get(_name), "127.0.0.1", "localhost"]))


@pytest.fixture(scope="session")
def s3() -> Iterator["S3Server"]:
    """A real S3 server; tests make buckets of their own."""
    from tests.support.s3_server import s3_server

    with s3_server() as server:
        yield server


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 3 MiB; needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.call(mount, stderr=subprocess.DEVNULL):
        pytest.skip("a small tmpfs can only be mounted by root")
    yield folder
    subprocess.check_call(["umount", str(folder)])


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
