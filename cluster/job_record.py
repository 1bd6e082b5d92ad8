"""What a cluster knows about a job, and what a person is told of it: pure, without Ray."""

import difflib
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from everstep.cluster import exit_codes
from everstep.cluster.job_entry import END
from everstep.cluster.submission import KEY_PREFIX, Submission

PENDING, RUNNING, STOPPED = "PENDING", "RUNNING", "STOPPED"
SUCCEEDED, FAILED = "SUCCEEDED", "FAILED"
_ENDED = frozenset({STOPPED, SUCCEEDED, FAILED})
_COMMAND_NOT_FOUND = 127
_TAIL_CHARS = 200
_END = re.compile(rf"^{re.escape(END)} (\d+)$", re.MULTILINE)
_STEP = re.compile(r"^(?:saved )?step (\d+)\b", re.MULTILINE)
_PLUMBING = re.compile(
    rf"(?:^.*\bjob_manager\.py:\d+ -- |^Running entrypoint for job |^{re.escape(END)} )"
)
_RAY_FAILURES = {
    "RUNTIME_ENV_SETUP_FAILURE": "the cluster could not set up the job's runtime env",
    "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE": "the cluster has no node that the job can be started on",
    "JOB_SUPERVISOR_ACTOR_START_TIMEOUT": "the cluster did not start the job in time",
    "JOB_SUPERVISOR_ACTOR_DIED": "the process of Ray that ran the job on the head node died",
}


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """A job as the job server describes it."""

    id: str
    status: str
    """Ray's word: one of PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED."""
    message: str = ""
    error_type: str | None = None
    exit_code: int | None = None
    """Of the job's command; None while it runs, and where it was stopped through Ray."""
    started_s: float | None = None
    """Seconds since the epoch."""
    ended_s: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    driver_host: str | None = None
    """Address of the node that the controller of the run is on, once it has joined the cluster."""
    driver_pid: int | None = None

    @property
    def ended(self) -> bool:
        """Nothing will change any more."""
        return self.status in _ENDED

    @property
    def is_ours(self) -> bool:
        """Submitted by ``everstep submit``."""
        return f"{KEY_PREFIX}run" in self.metadata

    def fact(self, key: str) -> str:
        """One of the facts that were submitted with the job; empty where it has none."""
        return self.metadata.get(f"{KEY_PREFIX}{key}", "")

    @property
    def grace_s(self) -> float:
        """Seconds that the run may take to stop."""
        try:
            return float(self.fact("grace_s"))
        except ValueError:
            return 0.0


class JobServer(Protocol):
    """The part of a cluster that runs jobs; ``ray_submit.py`` has the real one."""

    @property
    def address(self) -> str:
        """Where it is."""

    def submit(self, submission: Submission) -> None:
        """Send the archive and start the job. Raises JobIdTakenError, RequestRefusedError."""

    def get(self, job_id: str) -> JobRecord:
        """Raises UnknownJobError."""

    def jobs(self) -> list[JobRecord]:
        """All submitted jobs, also those of others."""

    def log(self, job_id: str) -> str:
        """All output of a job so far."""

    def tail(self, job_id: str) -> AsyncIterator[str]:
        """Its output from the beginning, in pieces, as it comes; ends soon after the job."""

    def stop(self, job_id: str) -> None:
        """SIGTERM to all processes of the job; SIGKILL when its own wait time is over."""

    def interrupt(self, record: JobRecord) -> None:
        """Ctrl-C to the controller of the run, on the node where it is."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a job ended."""

    exit_code: int
    sentence: str
    is_error: bool


class JobLog:
    """Turns the pieces of a log into lines to show, each once, also when the log is sent again.

    Args:
        seen_chars: what is at the beginning and not to be shown.
    """

    def __init__(self, seen_chars: int = 0) -> None:
        self._seen_chars = seen_chars
        self._position = 0
        self._rest = ""
        self._tail = ""

    @property
    def exit_code(self) -> int | None:
        """That the job told at its end, be that shown or not."""
        return told_exit_code(self._tail)

    def rewind(self) -> None:
        """The log comes from its beginning again."""
        self._position = 0
        self._tail = ""

    def feed(self, piece: str) -> list[str]:
        """Lines that are complete now."""
        begin = self._position
        self._tail = (self._tail + piece)[-_TAIL_CHARS:]
        self._position += len(piece)
        fresh = piece[max(0, self._seen_chars - begin) :]
        self._seen_chars = max(self._seen_chars, self._position)
        *lines, self._rest = (self._rest + fresh).split("\n")
        return self._shown(lines)

    def finish(self) -> list[str]:
        """The last line, where nothing ends it."""
        rest, self._rest = self._rest, ""
        return self._shown([rest]) if rest else []

    def _shown(self, lines: Sequence[str]) -> list[str]:
        return [line for line in lines if not _PLUMBING.match(line)]


def told_exit_code(log: str) -> int | None:
    """The exit code that a job tells in the last line of its log."""
    found = _END.findall(log)
    return int(found[-1]) if found else None


def last_step(log: str) -> int | None:
    """The last step that a log speaks of."""
    found = _STEP.findall(log)
    return int(found[-1]) if found else None


def state_word(record: JobRecord) -> str:
    """The state as we call it: waiting, running, done, stopped, failed."""
    if record.status == FAILED and record.exit_code in (
        exit_codes.STOPPED,
        exit_codes.INTERRUPTED,
    ):
        return "stopped"
    words = {
        PENDING: "waiting",
        RUNNING: "running",
        SUCCEEDED: "done",
        STOPPED: "stopped",
        FAILED: "failed",
    }
    return words.get(record.status, record.status.lower())


def ending_of(record: JobRecord, told: int | None) -> Ending:
    """How an ended job ended; ``told`` is the exit code in its log."""
    code = record.exit_code if record.exit_code is not None else told
    if record.status == SUCCEEDED:
        return Ending(exit_code=exit_codes.DONE, sentence=f"{record.id}: done", is_error=False)
    if code is None and record.status == STOPPED:
        return Ending(
            exit_code=exit_codes.FAILED,
            sentence=f"{record.id} was ended before it could finish its step and save (a run gets "
            f"train.grace_s={record.grace_s:g} s for that); what was saved before is whole",
            is_error=True,
        )
    if code is None:
        why = _RAY_FAILURES.get(record.error_type or "", "the job failed to run")
        detail = failure_detail(record.message)
        sentence = f"{record.id}: {why}{f': {detail}' if detail else ''}"
        return Ending(exit_code=exit_codes.FAILED, sentence=sentence, is_error=True)
    if code == _COMMAND_NOT_FOUND:
        return Ending(
            exit_code=exit_codes.FAILED,
            sentence=f"{record.id}: the head node has no such Python in its PATH; name the one "
            "that has everstep, torch and ray with --python",
            is_error=True,
        )
    words = {
        exit_codes.DONE: "done",
        exit_codes.STOPPED: "stopped as asked",
        exit_codes.INTERRUPTED: "stopped at once",
    }
    word = words.get(code, "failed")
    return Ending(
        exit_code=code,
        sentence=f"{record.id}: {word}, exit code {code}",
        is_error=code not in words,
    )


def failure_detail(message: str) -> str:
    """The line of a message of Ray that says most: the last one that names an error, or the last.

    Messages are tracebacks or several paragraphs; a person wants the one line.
    """
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"\berror\b|Error:|failed|cannot", line, re.I)]
    chosen = (telling or lines or [""])[-1]
    return chosen if len(chosen) <= 400 else f"{chosen[:397]}..."


def close_ids(job_id: str, known: Sequence[str]) -> list[str]:
    """Ids that may have been meant: those that it begins or ends, then similar ones; three."""
    parts = [other for other in known if job_id and (other.endswith(job_id) or job_id in other)]
    similar = difflib.get_close_matches(job_id, known, n=3)
    return list(dict.fromkeys([*parts, *similar]))[:3]


def writer_of(run_dir: str, records: Sequence[JobRecord]) -> JobRecord | None:
    """The job that writes to a run directory now, if one does."""
    return next((r for r in records if r.fact("run_dir") == run_dir and not r.ended), None)


def newest_of(run_dir: str, records: Sequence[JobRecord]) -> JobRecord | None:
    """The last job that ran in a run directory, if one did."""
    mine = [r for r in records if r.fact("run_dir") == run_dir]
    return max(mine, key=lambda r: r.started_s or 0.0, default=None)


def as_plain(record: JobRecord, exit_code: int | None, step: int | None) -> dict[str, Any]:
    """A job for programs: what ``everstep status --json`` prints; times in seconds since 1970."""
    return {
        "id": record.id,
        "state": state_word(record),
        "run": record.fact("run"),
        "run_dir": record.fact("run_dir"),
        "steps": int(record.fact("steps") or 0),
        "step": step,
        "exit_code": exit_code,
        "message": record.message,
        "started_s": record.started_s,
        "ended_s": record.ended_s,
        "command": record.fact("command"),
        "ray_status": record.status,
    }


def table_rows(records: Sequence[JobRecord]) -> list[tuple[str, ...]]:
    """Heading and one row per job of ours, newest first: id, state, since, run, directory."""
    ours = sorted(
        (record for record in records if record.is_ours), key=lambda r: -(r.started_s or 0.0)
    )
    rows: list[tuple[str, ...]] = [("ID", "STATE", "SINCE", "RUN", "RUN DIRECTORY")]
    for record in ours:
        since_s = record.ended_s if record.ended else record.started_s
        rows.append(
            (
                record.id,
                state_word(record),
                "" if since_s is None else local_time(since_s),
                record.fact("run"),
                record.fact("run_dir"),
            )
        )
    return rows


def local_time(epoch_s: float) -> str:
    """'2026-11-22 01:30:05' on the clock of this machine."""
    return f"{datetime.fromtimestamp(epoch_s):%Y-%m-%d %H:%M:%S}"
