"""Errors of a Ray cluster in our words; small servers stand in for the wrong addresses."""

import http.server
import pickle
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from everstep.cluster import job_errors, ray_submit
from everstep.cluster.job_errors import (
    ClusterAuthError,
    ClusterUnreachableError,
    ConnectionLostError,
    JobIdTakenError,
    NotADashboardError,
    RayMissingError,
    RequestRefusedError,
    UnknownJobError,
)
from everstep.cluster.ray_submit import RayJobServer, probe, record_of
from everstep.cluster.submission import Submission

requests = pytest.importorskip("requests")


@contextmanager
def web_server(status: int, body: bytes) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def raw_server(answer: bytes | None) -> Iterator[str]:
    """Accepts one connection and says ``answer``; None: nothing at all."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = threading.Event()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                if answer is None:
                    done.wait(10)
                else:
                    connection.recv(4096)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            done.set()
            thread.join()


@pytest.mark.parametrize("status", [401, 403])
def test_a_dashboard_that_wants_a_token_is_a_dashboard(status: int) -> None:
    with web_server(status, b"no") as address:
        assert probe(address)


def test_a_dashboard() -> None:
    with web_server(200, b'{"ray_version": "2.60.0"}') as address:
        assert not probe(address)


@pytest.mark.parametrize(
    ("status", "body"), [(404, b"{}"), (200, b"<html>"), (200, b"{}"), (500, b"")]
)
def test_other_web_servers(status: int, body: bytes) -> None:
    with (
        web_server(status, body) as address,
        pytest.raises(NotADashboardError, match=f"status {status}"),
    ):
        probe(address)


@pytest.mark.parametrize("answer", [b"\x00\x00\x18\x04\x00\x00", b""])
def test_a_port_that_speaks_something_else(answer: bytes) -> None:
    with (
        raw_server(answer) as address,
        pytest.raises(NotADashboardError, match=r"does not speak HTTP.*not the GCS port"),
    ):
        probe(address)


def test_a_port_that_says_nothing() -> None:
    with raw_server(None) as address, pytest.raises(ClusterUnreachableError, match="says nothing"):
        probe(address, timeout_s=0.2)


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ClusterUnreachableError, match=r"\(connection refused\).*--address is"):
        probe(f"http://127.0.0.1:{port}")


def test_no_ray_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.job_submission", None)
    with (
        web_server(200, b'{"ray_version": "2.60.0"}') as address,
        pytest.raises(RayMissingError, match=r"pip install 'everstep\[ray\]'"),
    ):
        RayJobServer(address)


class FakeClient:
    """Ray's client, failing as told."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: object, **named: object) -> Any:
            if name == "list_jobs":
                return [details(submission_id="job-b")]
            raise self.error

        return call


def details(**changes: Any) -> SimpleNamespace:
    facts: dict[str, Any] = {
        "submission_id": "job-a",
        "job_id": None,
        "status": SimpleNamespace(value="RUNNING"),
        "message": None,
        "error_type": None,
        "driver_exit_code": None,
        "start_time": 1500,
        "end_time": None,
        "metadata": None,
        "driver_info": SimpleNamespace(node_ip_address="10.0.0.1", pid="42"),
    }
    return SimpleNamespace(**{**facts, **changes})


def server_failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> RayJobServer:
    monkeypatch.setattr(ray_submit, "_connect", lambda address: FakeClient(error))
    return RayJobServer("http://head:8265")


def test_records() -> None:
    record = record_of(details())
    assert (record.id, record.status, record.started_s) == ("job-a", "RUNNING", 1.5)
    assert (record.driver_host, record.driver_pid, record.message) == ("10.0.0.1", 42, "")
    assert record_of(details(driver_info=None, metadata={"a": "b"})).metadata == {"a": "b"}


def test_unknown_job(monkeypatch: pytest.MonkeyPatch) -> None:
    server = server_failing(
        monkeypatch, RuntimeError("Request failed with status code 404: Job x does not exist.")
    )
    with pytest.raises(UnknownJobError, match="no job 'job-bb'; did you mean job-b"):
        server.get("job-bb")
    with pytest.raises(UnknownJobError, match="`everstep status` lists those that it has"):
        server.stop("zzz")


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "Request failed with status code 500: Traceback (most recent call last):\n  File x\n"
        "ValueError: the disk is full\n."
    )
    with pytest.raises(RequestRefusedError, match=r"refused .*: ValueError: the disk is full$"):
        server_failing(monkeypatch, RuntimeError(text)).log("job-a")


def test_connection_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    error = requests.exceptions.ConnectionError("Pool: [Errno 111] Connection refused")
    with pytest.raises(ConnectionLostError, match=r"\(connection refused\)"):
        server_failing(monkeypatch, error).get("job-a")


def test_a_token_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    class AuthenticationError(Exception):
        """As Ray has it."""

    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(ClusterAuthError, match="no token of this machine was accepted"):
        server_failing(monkeypatch, AuthenticationError("long story")).get("job-a")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ClusterAuthError, match="RAY_AUTH_MODE=disabled here"):
        server_failing(monkeypatch, AuthenticationError("long story")).get("job-a")


def test_id_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Request failed with status code 400: Job with submission_id job-a already exists."
    server = server_failing(monkeypatch, RuntimeError(text))
    submission = Submission(
        job_id="job-a", entrypoint="true", metadata={}, env={}, pip=(), archive=Path("x.zip")
    )
    with pytest.raises(JobIdTakenError, match="--id job-a"):
        server.submit(submission)


class ControlClient:
    """Ray's client with one job, which does not start by itself; like Ray, it keeps one that waits.

    Args:
        status: of the job from its submission on.
        stopped: its status after it was asked to stop.
    """

    def __init__(self, status: str, stopped: str = "STOPPED") -> None:
        self.status, self.stopped = status, stopped
        self.submitted: dict[str, Any] = {}
        self.calls: list[str] = []

    def submit_job(self, **job: Any) -> None:
        self.submitted = job

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        return details(submission_id=job_id, status=SimpleNamespace(value=self.status))

    def stop_job(self, job_id: str) -> None:
        self.calls.append("stop")
        self.status = self.stopped

    def delete_job(self, job_id: str) -> None:
        assert job_id == self.submitted["submission_id"]
        self.calls.append("delete")
        if self.status in ("PENDING", "RUNNING"):
            raise RuntimeError(f"Attempted to delete job '{job_id}', but it is in {self.status}.")


def interrupt_with(monkeypatch: pytest.MonkeyPatch, client: ControlClient) -> None:
    monkeypatch.setattr(ray_submit, "_connect", lambda address: client)
    for limit in ("_CONTROL_S", "_STOPPED_S", "_CONTROL_POLL_S"):
        monkeypatch.setattr(ray_submit, limit, 0.01)
    RayJobServer("http://head:8265").interrupt(record_of(details()))


def test_an_interrupt_is_a_job_that_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    client = ControlClient("SUCCEEDED")
    interrupt_with(monkeypatch, client)
    assert "kill -INT 42" in client.submitted["entrypoint"]
    assert client.submitted["entrypoint_resources"] == {"node:10.0.0.1": 0.001}
    assert client.calls == ["delete"]


@pytest.mark.parametrize("stopped", ["STOPPED", "PENDING"])
def test_an_interrupt_that_waits_for_its_turn_is_stopped(
    monkeypatch: pytest.MonkeyPatch, stopped: str
) -> None:
    client = ControlClient("PENDING", stopped)
    interrupt_with(monkeypatch, client)
    assert client.calls == ["stop", "delete"]


@pytest.mark.parametrize(
    "error",
    [
        job_errors.RayMissingError("why"),
        job_errors.ClusterUnreachableError("a", "b"),
        job_errors.NotADashboardError("a", "b"),
        job_errors.ClusterAuthError("a", None),
        job_errors.ConnectionLostError("a", "b"),
        job_errors.RequestRefusedError("a", "b"),
        job_errors.UnknownJobError("a", ["b"]),
        job_errors.JobIdTakenError("a"),
        job_errors.ForeignJobError("a"),
        job_errors.RunDirTakenError("a", "b"),
    ],
)
def test_errors_are_one_sentence_and_survive_pickling(error: Exception) -> None:
    assert "\n" not in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
