"""A Ray cluster that this process has joined as a driver; the only doorway to ray's own names.

Actors and placement groups that are created through it belong to this process: when it ends,
however that comes about, Ray ends them.
"""

import importlib.util
import logging
import signal
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from everstep.cluster.causes import one_line
from everstep.cluster.driver import Waiting, wait_silently
from everstep.cluster.errors import LaunchError
from everstep.cluster.ray_plan import Node
from everstep.trainer.errors import ConfigError

REACH_S = 15.0
"""Longest time that a cluster may take to answer."""
_POLL_S = 0.1


def require_ray() -> None:
    """Raise ConfigError where ray is not installed; does not import it."""
    if not ray_installed():
        raise ConfigError(
            "--launcher ray needs ray, which is not installed: pip install 'everstep[ray]', or use "
            "--launcher local"
        )


def ray_installed() -> bool:
    """Whether ray can be imported; does not import it."""
    return importlib.util.find_spec("ray") is not None


def check_address(address: str) -> None:
    """Raise ConfigError unless an address is one that a command inside the cluster can join."""
    if "://" in address:
        raise ConfigError(
            f"launch.address={address!r} is for programs outside of the cluster: everstep submit "
            "CONFIG --address http://HEAD:8265 runs a config there, or give 'host:port' or 'auto' "
            "on a node of the cluster"
        )
    host, _, port = address.rpartition(":")
    if address != "auto" and not (host and port.isdigit() and int(port) < 65536):
        raise ConfigError(
            f"launch.address: got {address!r}, expected 'host:port' of the head of a Ray cluster "
            "(often port 6379), or 'auto' on one of its nodes"
        )


class RayCluster:
    """A joined cluster; a context manager that leaves it."""

    def __init__(self, address: str) -> None:
        self.address = address

    def nodes(self) -> list[Node]:
        """Nodes that are alive, the head first."""
        import ray

        return [
            Node(
                node_id=facts["NodeID"],
                address=facts["NodeManagerAddress"],
                hostname=facts["NodeManagerHostname"],
                port=facts["NodeManagerPort"],
                resources=facts["Resources"],
                labels=facts.get("Labels") or {},
            )
            for facts in sorted(ray.nodes(), key=_head_first)
            if facts["Alive"]
        ]

    def free(self) -> Mapping[str, float]:
        """What nobody uses now, over all nodes."""
        import ray

        found: Mapping[str, float] = ray.available_resources()
        return found

    def gpus(self) -> int:
        """GPUs of all nodes."""
        return int(sum(node.resources.get("GPU", 0) for node in self.nodes()))

    def own_address(self) -> str:
        """IP address of this host, as the other nodes know it."""
        import ray

        return str(ray.util.get_node_ip_address())

    def failure(self) -> str | None:
        """Why the cluster can no longer be used; None = it can."""
        return None

    def leave(self) -> None:
        """End what this process has in the cluster; may be called twice."""
        import ray

        if ray.is_initialized():
            ray.shutdown()

    def __enter__(self) -> "RayCluster":
        return self

    def __exit__(self, *error: object) -> None:
        self.leave()


def join(address: str, waiting: Waiting = wait_silently) -> RayCluster:
    """Join the cluster at 'host:port', or 'auto' for the one that runs on this host.

    Raises LaunchError where none answers, or where this process cannot be part of it.
    """
    import ray

    where = _find(address)
    _reach(where, waiting)
    # Warnings of Ray are for its own log files, except what ends the run: that comes as an error.
    logging.getLogger("ray").setLevel(logging.ERROR)
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=where, log_to_driver=False, logging_level=logging.ERROR)
    except (RuntimeError, ConnectionError, ValueError, OSError) as error:
        raise LaunchError(_why_not_joined(where, str(error))) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # ray.init takes it
    return RayCluster(where)


def _find(address: str) -> str:
    if address != "auto":
        return address
    from ray._private.services import canonicalize_bootstrap_address_or_die

    try:
        return str(canonicalize_bootstrap_address_or_die("auto"))
    except (ConnectionError, ValueError) as error:
        raise LaunchError(
            "launch.address=auto: no Ray cluster runs on this host (ray start joins one); give the "
            "'host:port' of its head, or leave the address out to start Ray for this run"
        ) from error


def _reach(address: str, waiting: Waiting) -> None:
    """Raise LaunchError unless a Ray of our version answers soon.

    ray.init would try for minutes.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        why = error.strerror or str(error)
        raise LaunchError(
            f"no Ray cluster answers at {address} ({why}): check the address (that of the head's "
            "GCS, often port 6379) and that the cluster runs"
        ) from error
    answer: list[Any] = []

    def ask() -> None:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        try:
            client = GcsClient(address=address)
            answer.append(list(client.get_all_node_info(timeout=REACH_S).values()))
        except Exception as error:
            answer.append(error)

    thread = threading.Thread(target=ask, name="everstep-reach-ray", daemon=True)
    thread.start()
    deadline_s = time.monotonic() + REACH_S
    while thread.is_alive() and time.monotonic() < deadline_s:
        waiting(f"joining the Ray cluster at {address}")
        thread.join(_POLL_S)
    if not answer:
        raise LaunchError(
            f"what listens at {address} does not answer as Ray within {REACH_S:g} s: check that it "
            "is the address of the head's GCS (often port 6379, not the dashboard's 8265)"
        )
    if isinstance(answer[0], Exception):
        raise LaunchError(_why_not_joined(address, str(answer[0]))) from answer[0]


def _why_not_joined(address: str, message: str) -> str:
    text = one_line(message)
    if "ersion mismatch" in message:
        text = " ".join(message.split())
        return (
            f"this command and the Ray cluster at {address} differ in version: install the same "
            f"Python and Ray here ({text})"
        )
    if ("IP address" in message and "Raylet" in message) or "find any" in message:
        return (
            f"this host is not a node of the Ray cluster at {address}: run the command on one of "
            "its nodes, or use everstep submit CONFIG --address http://HEAD:8265"
        )
    if "uthenticat" in message or "oken" in message:
        return (
            f"the Ray cluster at {address} asks for a token that this command does not have: copy "
            f"~/.ray/auth_token of the cluster here, or set RAY_AUTH_TOKEN_PATH ({text})"
        )
    return f"the Ray cluster at {address} cannot be joined: {text}"


def _head_first(facts: Mapping[str, Any]) -> tuple[bool, str]:
    return ("node:__internal_head__" not in facts["Resources"], facts["NodeID"])
