"""The job server of a Ray cluster, through Ray's own client; all errors are ours, of one sentence.

Ray's client has no time limits and lets environment variables beat the address that it is given;
both are mended here.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import shlex
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeVar

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
from everstep.cluster.job_record import JobRecord, close_ids, failure_detail
from everstep.cluster.submission import ADDRESS_VARIABLES, KEY_PREFIX, Submission

CONNECT_S = 10.0
"""Longest wait for a cluster to accept a connection."""
ANSWER_S = 120.0
"""Longest silence within an answer; head nodes under load take their time."""
_CONTROL_S = 60.0
_STOPPED_S = 10.0
_CONTROL_POLL_S = 0.3
_AUTH_MODE = "RAY_AUTH_MODE"
_NOT_FOUND = "status code 404"

T = TypeVar("T")


class RayJobServer:
    """The job server at a dashboard address; a ``JobServer``.

    Raises:
        RayMissingError: no Ray here, or not ``ray[default]``.
        ClusterUnreachableError, NotADashboardError, ClusterAuthError: wrong address or token.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._client = _connect(address)

    @property
    def address(self) -> str:
        """Where it is."""
        return self._address

    def submit(self, submission: Submission) -> None:
        """Send the archive and start the job. Raises JobIdTakenError, RequestRefusedError."""
        runtime_env: dict[str, Any] = {
            "working_dir": str(submission.archive),
            "env_vars": dict(submission.env),
        }
        if submission.pip:
            runtime_env["pip"] = list(submission.pip)
        try:
            self._ask(
                f"the job {submission.job_id}",
                lambda: self._client.submit_job(
                    entrypoint=submission.entrypoint,
                    submission_id=submission.job_id,
                    runtime_env=runtime_env,
                    metadata=dict(submission.metadata),
                ),
            )
        except RequestRefusedError as error:
            if "already exists" in error.why:
                raise JobIdTakenError(submission.job_id) from None
            raise

    def get(self, job_id: str) -> JobRecord:
        """Raises UnknownJobError, ConnectionLostError."""
        return self._of_job(job_id, lambda: record_of(self._client.get_job_info(job_id)))

    def jobs(self) -> list[JobRecord]:
        """All submitted jobs, also those of others."""
        details = self._ask("a list of its jobs", self._client.list_jobs)
        return [record_of(job) for job in details if job.submission_id]

    def log(self, job_id: str) -> str:
        """All output of a job so far."""
        log: str = self._of_job(job_id, lambda: self._client.get_job_logs(job_id))
        return log

    async def tail(self, job_id: str) -> AsyncIterator[str]:
        """Its output from the beginning, in pieces, as it comes; ends soon after the job."""
        import aiohttp

        stream = self._client.tail_job_logs(job_id)
        try:
            async for piece in stream:
                yield piece
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            raise ConnectionLostError(self._address, _reason(error)) from error
        finally:
            await stream.aclose()

    def stop(self, job_id: str) -> None:
        """SIGTERM to all processes of the job; SIGKILL when its own wait time is over."""
        self._of_job(job_id, lambda: self._client.stop_job(job_id))

    def interrupt(self, record: JobRecord) -> None:
        """Ctrl-C to the controller of the run, on the node where it is.

        Ray's job server can do no more than ``stop``; hence a second, short job on that node, which
        is taken off the list again.
        """
        assert record.driver_pid is not None
        job_id = f"{record.id}-now-{secrets.token_hex(2)}"
        pid = record.driver_pid
        # twice, because the first of two is taken for the SIGTERM that came before, if close
        script = f"kill -INT {pid}; sleep 1; kill -INT {pid} 2>/dev/null; exit 0"
        self._ask(
            f"to interrupt {record.id}",
            lambda: self._client.submit_job(
                entrypoint=f"sh -c {shlex.quote(script)}",
                submission_id=job_id,
                metadata={f"{KEY_PREFIX}control": record.id},
                entrypoint_resources={f"node:{record.driver_host}": 0.001},
            ),
        )
        if not self._ends_within(job_id, _CONTROL_S):
            # Ray deletes no job that waits for its turn; when that comes, the pid may be another's
            self.stop(job_id)
            self._ends_within(job_id, _STOPPED_S)
        with contextlib.suppress(RequestRefusedError):  # it waits even now
            self._ask(f"to forget {job_id}", lambda: self._client.delete_job(job_id))

    def _ends_within(self, job_id: str, limit_s: float) -> bool:
        """Wait for a job to end; returns whether it did in time."""
        limit_at_s = time.monotonic() + limit_s
        while not (ended := self.get(job_id).ended) and time.monotonic() < limit_at_s:
            time.sleep(_CONTROL_POLL_S)
        return ended

    def _of_job(self, job_id: str, request: Callable[[], T]) -> T:
        try:
            return self._ask(f"a question about {job_id}", request)
        except RequestRefusedError as error:
            if _NOT_FOUND not in error.why:
                raise
        raise UnknownJobError(job_id, close_ids(job_id, [job.id for job in self.jobs()]))

    def _ask(self, doing: str, request: Callable[[], T]) -> T:
        import requests

        try:
            return request()
        except requests.exceptions.RequestException as error:
            raise ConnectionLostError(self._address, _reason(error)) from error
        except (RuntimeError, ValueError) as error:  # ValueError: Ray checks before it sends
            why = str(error)
            raise RequestRefusedError(
                doing, why if _NOT_FOUND in why else failure_detail(why)
            ) from error
        except Exception as error:
            _raise_if_auth(self._address, error)
            raise


def record_of(details: Any) -> JobRecord:
    """Ray's ``JobDetails`` as plain data."""
    driver = details.driver_info
    return JobRecord(
        id=details.submission_id or details.job_id,
        status=str(getattr(details.status, "value", details.status)),
        message=details.message or "",
        error_type=details.error_type,
        exit_code=details.driver_exit_code,
        started_s=None if not details.start_time else details.start_time / 1000,
        ended_s=None if not details.end_time else details.end_time / 1000,
        metadata=dict(details.metadata or {}),
        driver_host=driver.node_ip_address if driver else None,
        driver_pid=int(driver.pid) if driver else None,
    )


def _connect(address: str) -> Any:
    """A client of which every request ends in time."""
    try:
        import aiohttp  # noqa: F401
        import requests

        if probe(address):  # Ray's client sends its token only when told to, before it is imported
            os.environ.setdefault(_AUTH_MODE, "token")
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise RayMissingError(str(error)) from error
    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private"):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)  # what matters is said here

    class Client(JobSubmissionClient):
        """Ray's client with time limits."""

        def _do_request(self, method: str, endpoint: str, **arguments: Any) -> Any:
            arguments.setdefault("timeout", (CONNECT_S, ANSWER_S))
            return super()._do_request(method, endpoint, **arguments)

    try:
        with _without(ADDRESS_VARIABLES):
            return Client(address)
    except (requests.exceptions.RequestException, ConnectionError) as error:
        raise ClusterUnreachableError(address, _reason(error)) from error
    except RuntimeError as error:
        raise NotADashboardError(address, failure_detail(str(error))) from error
    except Exception as error:
        _raise_if_auth(address, error)
        raise


def probe(address: str, timeout_s: float = CONNECT_S) -> bool:
    """See in time that a Ray dashboard is there; returns whether it wants a token.

    Raises:
        ClusterUnreachableError: nothing answers.
        NotADashboardError: something else answers.
    """
    import requests

    try:
        answer = requests.get(f"{address}/api/version", timeout=(timeout_s, timeout_s))
    except requests.exceptions.ReadTimeout as error:
        raise ClusterUnreachableError(
            address, f"it accepts connections and says nothing for {timeout_s:g} s"
        ) from error
    except requests.exceptions.ConnectionError as error:
        if "BadStatusLine" in str(error) or "RemoteDisconnected" in str(error):
            raise NotADashboardError(address, "it does not speak HTTP") from error
        raise ClusterUnreachableError(address, _reason(error)) from error
    except requests.exceptions.RequestException as error:
        raise ClusterUnreachableError(address, _reason(error)) from error
    if answer.status_code in (401, 403):
        return True
    try:
        known = answer.ok and "ray_version" in answer.json()
    except ValueError:
        known = False
    if not known:
        raise NotADashboardError(
            address, f"status {answer.status_code} for /api/version, and no version of Ray"
        )
    return False


def _raise_if_auth(address: str, error: Exception) -> None:
    """Ray's error about tokens is known by name: older versions have none."""
    if type(error).__name__ == "AuthenticationError":
        raise ClusterAuthError(address, os.environ.get(_AUTH_MODE)) from None


def _reason(error: BaseException) -> str:
    """What the operating system said, out of the onion that HTTP libraries wrap it in."""
    if isinstance(error, asyncio.TimeoutError):
        return "timed out"
    text = str(error)
    for words in (
        "Connection refused",
        "No route to host",
        "Name or service not known",
        "Temporary failure in name resolution",
        "Network is unreachable",
        "Connection reset by peer",
        "CERTIFICATE_VERIFY_FAILED",
        "timed out",
    ):
        if words.lower() in text.lower():
            return words[:1].lower() + words[1:]
    return failure_detail(text) or type(error).__name__


@contextlib.contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    """These environment variables are not set meanwhile."""
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
