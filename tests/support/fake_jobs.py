"""A job server in memory: what a cluster would do with a job is scripted by the test."""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

from everstep.cluster.job_errors import ConnectionLostError, JobIdTakenError, UnknownJobError
from everstep.cluster.job_record import JobRecord, close_ids
from everstep.cluster.submission import Submission

ADDRESS = "http://head:8265"


class FakeJobServer:
    """A JobServer; ``records`` and ``outputs`` (job id -> log) are its state."""

    address = ADDRESS

    def __init__(self, *records: JobRecord) -> None:
        self.records = {record.id: record for record in records}
        self.outputs: dict[str, str] = {}
        self.submitted: list[Submission] = []
        self.archives: list[bytes] = []
        self.stopped: list[str] = []
        self.interrupted: list[str] = []
        self.connection_errors = 0
        """Requests that will fail before one is answered again."""
        self.tails: list[Sequence[str]] = []
        """Pieces that the next streams bring; a connection breaks after each but the last one."""
        self.on_get: Callable[[], None] = lambda: None

    def submit(self, submission: Submission) -> None:
        if submission.job_id in self.records:
            raise JobIdTakenError(submission.job_id)
        self.submitted.append(submission)
        self.archives.append(submission.archive.read_bytes())
        self.records[submission.job_id] = JobRecord(
            id=submission.job_id, status="SUCCEEDED", exit_code=0, metadata=submission.metadata
        )

    def get(self, job_id: str) -> JobRecord:
        self._connect()
        self.on_get()
        if job_id not in self.records:
            raise UnknownJobError(job_id, close_ids(job_id, list(self.records)))
        return self.records[job_id]

    def jobs(self) -> list[JobRecord]:
        self._connect()
        return list(self.records.values())

    def log(self, job_id: str) -> str:
        self._connect()
        return self.outputs.get(job_id, "")

    async def tail(self, job_id: str) -> AsyncIterator[str]:
        self._connect()
        if not self.tails:
            yield self.outputs.get(job_id, "")
            return
        for piece in self.tails.pop(0):
            yield piece
        if self.tails:
            raise ConnectionLostError(self.address, "connection reset by peer")

    def stop(self, job_id: str) -> None:
        self.stopped.append(job_id)

    def interrupt(self, record: JobRecord) -> None:
        self.interrupted.append(record.id)

    def change(self, job_id: str, status: str, exit_code: int | None = None) -> None:
        """The job is now in this state."""
        self.records[job_id] = replace(self.records[job_id], status=status, exit_code=exit_code)

    def _connect(self) -> None:
        if self.connection_errors:
            self.connection_errors -= 1
            raise ConnectionLostError(self.address, "connection refused")
