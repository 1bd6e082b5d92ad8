"""A Ray of a run's own on this host: its nodes, started by a helper and gone with it.

``OwnRay`` is the controller's side; ``serve`` runs in the helper's process. Everything that this
Ray writes is in a folder of its own below the system's temporary directory, removed at the end; it
takes no fixed port, and does not touch another Ray of this host. Whoever wants to talk to it needs
a token that only this user can read.
"""

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from everstep.cluster import host
from everstep.cluster.driver import Waiting, wait_silently
from everstep.cluster.errors import LaunchError
from everstep.cluster.helper import Helper
from everstep.trainer.rank_spec import Reporter, StopRequested

START_S = 120.0
"""Longest time that starting Ray may take."""
_TARGET = "everstep.cluster.ray_nodes:serve"
_LAST_ACT = "everstep.cluster.ray_nodes:end"
_CLOSE_S = 20.0
_PREFIX = "everstep-ray-"
_SHORTEST_TMP = 40
"""Ray puts Unix sockets there, whose names may not be long."""
_STORE_BYTES = 80 * 2**20
"""Object store of a node: the least that Ray accepts, since nothing large is kept there."""
_HEAD: dict[str, Any] = {
    "dashboard_port": 0,
    "include_log_monitor": False,
    "no_monitor": True,
}
_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class NodePlan:
    """One node to start."""

    cpus: int
    gpus: Sequence[str] = ()
    """Its GPUs, as they are named in CUDA_VISIBLE_DEVICES."""
    resources: Mapping[str, float] | None = None
    labels: Mapping[str, str] | None = None


class OwnRay:
    """Ray on this host with the nodes that are asked for; ``start`` it, and ``close`` it.

    Args:
        nodes: the first one is the head.
        log: file for what its processes say.
        dashboard: start Ray's dashboard, which also takes jobs.
        token: let in only who has the token; a process that has used Ray before cannot get in then.
    """

    def __init__(
        self,
        nodes: Sequence[NodePlan],
        log: Path,
        *,
        dashboard: bool = False,
        token: bool = True,
    ) -> None:
        remove_abandoned()
        self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_temporary()))
        self._nodes = nodes
        self._log = log
        self._dashboard = dashboard
        self._token = token
        self._helper: Helper | None = None
        self.address = ""
        """'host:port', once it is started."""
        self.dashboard_url = ""
        """'http://host:port', where a dashboard was asked for."""
        self.raylets: dict[str, int] = {}
        """Process of every node, by its id."""

    @property
    def environment(self) -> dict[str, str]:
        """Variables that a process needs to join it; to be set before ray is imported there."""
        known = {"RAY_TMPDIR": str(self._folder), "RAY_USAGE_STATS_ENABLED": "0"}
        if not self._token:
            return {**known, "RAY_AUTH_MODE": "disabled"}
        token = str(self._folder / "token")
        return {**known, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token}

    def start(self, waiting: Waiting = wait_silently) -> None:
        """Start all nodes. Raises LaunchError."""
        token = os.open(self._folder / "token", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(token, "w") as file:
            file.write(secrets.token_hex(32))
        subject = {
            "folder": str(self._folder),
            "dashboard": self._dashboard,
            "nodes": [asdict(node) for node in self._nodes],
        }
        self._helper = Helper(
            "the Ray of this run",
            _TARGET,
            self._log,
            subject=subject,
            environment=self.environment,
            last_act=_LAST_ACT,
        )
        count = len(self._nodes)
        what = f"starting Ray on this host{f' ({count} simulated nodes)' if count > 1 else ''}"
        deadline_s = time.monotonic() + START_S
        while not self.address:
            waiting(what)
            time.sleep(_POLL_S)
            why = self.failure()
            if why is None and time.monotonic() > deadline_s:
                why = f"Ray did not start on this host within {START_S:g} s (see {self._log})"
            if why is not None:
                raise LaunchError(f"{why}; --launcher local needs no Ray")

    def failure(self) -> str | None:
        """Why it no longer runs; None = it does."""
        if self._helper is None:
            return None
        reports = self._helper.poll()
        for report in reports:
            if report["kind"] == "serving":
                self.address = report["address"]
                self.dashboard_url = report["dashboard"]
                self.raylets = report["raylets"]
        return self._helper.failure(reports)

    def close(self) -> None:
        """End all its processes and remove its folder; may be called twice."""
        if self._helper is not None:
            self._helper.close(_CLOSE_S)
            self._helper = None
        shutil.rmtree(self._folder, ignore_errors=True)


def remove_abandoned() -> None:
    """Remove the folders of helpers of this user that were killed."""
    for folder in Path(_temporary()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), (folder / "lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


def serve(subject: dict[str, Any], report: Reporter, should_stop: StopRequested) -> int:
    """Start the nodes and keep them until asked to stop. Runs in a process of its own."""
    folder = Path(subject["folder"])
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "ray").mkdir()
        try:
            return _serve(subject, report, should_stop)
        finally:
            end(subject)


def end(subject: dict[str, Any]) -> None:
    """End all processes of all nodes, and remove what they wrote."""
    host.adopt_orphans()  # what a node leaves behind when it is killed
    host.end_descendants()
    shutil.rmtree(subject["folder"], ignore_errors=True)


def _serve(subject: dict[str, Any], report: Reporter, should_stop: StopRequested) -> int:
    from ray.cluster_utils import Cluster

    logging.getLogger("ray").setLevel(logging.WARNING)
    cluster = Cluster()  # whose processes the kernel ends with this one
    started = []
    for number, plan in enumerate(subject["nodes"]):
        node = NodePlan(**plan)
        if node.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(node.gpus)
        started.append(
            cluster.add_node(
                num_cpus=node.cpus,
                num_gpus=len(node.gpus),
                resources=dict(node.resources or {}),
                labels=dict(node.labels or {}),
                object_store_memory=_STORE_BYTES,
                dashboard_agent_listen_port=None,
                include_dashboard=subject["dashboard"],
                # nodes of one host would unpack a job's folder over each other's feet
                runtime_env_dir_name=f"runtime_resources_{number}",
                **(_HEAD if number == 0 else {}),
            )
        )
    url = cluster.webui_url
    report(
        {
            "kind": "serving",
            "address": cluster.address,
            "dashboard": f"http://{url}" if subject["dashboard"] else "",
            "raylets": {node.node_id: _raylet_pid(node) for node in started},
        }
    )
    while not should_stop():
        time.sleep(_POLL_S)
        dead = [name for name, _ in started[0].dead_processes()]
        if dead:
            raise LaunchError(
                f"the head of this run's Ray ended ({', '.join(dead)}): the same command starts it "
                "again and goes on from the last checkpoint"
            )
    return 0


def _raylet_pid(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def _temporary() -> str:
    folder = tempfile.gettempdir()
    return folder if len(folder) <= _SHORTEST_TMP else "/tmp"
