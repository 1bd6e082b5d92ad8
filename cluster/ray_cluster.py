"""A Ray cluster that this process has joined as a driver; the only doorway to ray's own names.

Actors and placement groups that are created through it belong to this process: when it ends,
however that comes about, Ray ends them.
"""

import atexit
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from everstep.cluster.causes import one_line
from everstep.cluster.driver import Waiting, wait_silently
from everstep.cluster.errors import LaunchError
from everstep.cluster.ray_plan import Node

REACH_S = 15.0
"""Longest time that a cluster may take to answer."""
SILENT_S = 40.0
"""A cluster whose head has not answered for so long is given up; Ray would abort after 60 s."""
_CONNECT_S = 5.0
_LEAVE_S = 60.0
_LEAVE_LOST_S = 5.0
_PROBE_EVERY_S = 2.0
_POLL_S = 0.1


class RayCluster:
    """A joined cluster; a context manager that leaves it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.left = True
        """Leaving it did not fail; else threads of Ray hang in this process."""
        self._probed_s = time.monotonic()
        self._answered_s = self._probed_s

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

    def messages_to(self, log: Path) -> None:
        """What Ray has to say about the cluster from now on goes to the end of a file."""

        def write(message: Mapping[str, Any]) -> None:
            with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:
                file.writelines(f"({message['pid']}) {line}\n" for line in message["lines"])

        _take_messages(write)

    def failure(self) -> str | None:
        """Why the cluster can no longer be used; None = it can."""
        now_s = time.monotonic()
        if now_s - self._probed_s >= _PROBE_EVERY_S:
            self._probed_s = now_s
            if answers(self.address):
                self._answered_s = now_s
        if now_s - self._answered_s < SILENT_S:
            return None
        return f"the head of the Ray cluster at {self.address} has not answered for {SILENT_S:g} s"

    def leave(self) -> None:
        """End what this process has in the cluster; may be called twice."""
        import ray

        if not ray.is_initialized():
            return
        limit_s = _LEAVE_S if self.failure() is None else _LEAVE_LOST_S
        if not within(limit_s, ray.shutdown):
            atexit.unregister(ray.shutdown)  # it would wait there again
            self.left = False

    def __enter__(self) -> "RayCluster":
        return self

    def __exit__(self, *error: object) -> None:
        self.leave()


def within(limit_s: float, call: Callable[[], object]) -> bool:
    """Whether a call to Ray returned in time; without its head, Ray waits for a minute and aborts.

    What it raises is of no interest here.
    """

    return bool(_outcome(limit_s, call))


def answers(address: str, timeout_s: float = 1.0) -> bool:
    """Whether somebody listens at 'host:port'."""
    try:
        _connect(address, timeout_s)
    except OSError:
        return False
    return True


def join(address: str, waiting: Waiting = wait_silently) -> RayCluster:
    """Join the cluster at 'host:port', or 'auto' for the one that runs on this host.

    Raises LaunchError where none answers, or where this process cannot be part of it.
    """
    import ray

    where = _find(address)
    _reach(where, waiting)
    # Warnings of Ray are for its own log files, except what ends the run: that comes as an error.
    logging.getLogger("ray").setLevel(logging.ERROR)
    _take_messages(lambda message: None)
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
    try:
        _connect(address, _CONNECT_S)
    except OSError as error:
        why = error.strerror or str(error)
        raise LaunchError(
            f"no Ray cluster answers at {address} ({why}): check the address (that of the head's "
            "GCS, often port 6379) and that the cluster runs"
        ) from error

    def ask() -> None:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        GcsClient(address=address).get_all_node_info(timeout=REACH_S)

    outcome = _outcome(REACH_S, ask, lambda: waiting(f"joining the Ray cluster at {address}"))
    if not outcome:
        raise LaunchError(
            f"what listens at {address} does not answer as Ray within {REACH_S:g} s: check that it "
            "is the address of the head's GCS (often port 6379, not the dashboard's 8265)"
        )
    if outcome[0] is not None:
        raise LaunchError(_why_not_joined(address, str(outcome[0]))) from outcome[0]


def _connect(address: str, timeout_s: float) -> None:
    """Raise OSError unless somebody listens at 'host:port'."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()


def _outcome(
    limit_s: float, call: Callable[[], object], meanwhile: Callable[[], None] = lambda: None
) -> list[Exception | None]:
    """What a call in a thread raised, None if it returned; an empty list: neither in time."""
    outcome: list[Exception | None] = []

    def run() -> None:
        try:
            call()
        except Exception as error:
            outcome.append(error)
        else:
            outcome.append(None)

    thread = threading.Thread(target=run, name="everstep-ray-call", daemon=True)
    thread.start()
    deadline_s = time.monotonic() + limit_s
    while thread.is_alive() and (left_s := deadline_s - time.monotonic()) > 0:
        meanwhile()
        thread.join(min(_POLL_S, left_s))
    return outcome


def _take_messages(write: Callable[[Mapping[str, Any]], None]) -> None:
    """Ray prints messages about nodes and workers to standard output, whatever it is told."""
    from ray._private import worker

    def print_to_stdstream(message: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        write(message)

    worker.print_to_stdstream = print_to_stdstream  # type: ignore[assignment]


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
