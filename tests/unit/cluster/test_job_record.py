"""What is told about a job: its state, how it ended, its log without Ray's plumbing."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.cluster import job_record
from everstep.cluster.job_record import Ending, JobLog, JobRecord

LOG = """\
2026-11-22 01:25:08,832\tINFO job_manager.py:581 -- Runtime env is setting up.
Running entrypoint for job a: exec python .everstep/job.py
small: 20 steps on 2 ranks
step 1/20 · loss 5.7734
saved step 12: 517.6 KiB
stopped, step 12 is saved
everstep job ended with exit code 75
"""
SHOWN = LOG.splitlines()[2:-1]


def record(status: str = "RUNNING", **facts: Any) -> JobRecord:
    metadata = {"everstep_run": "small", "everstep_run_dir": "/r", "everstep_grace_s": "30"}
    return JobRecord(id=facts.pop("id", "a"), status=status, **{"metadata": metadata, **facts})


@pytest.mark.parametrize(
    ("status", "exit_code", "word"),
    [
        ("PENDING", None, "waiting"),
        ("RUNNING", None, "running"),
        ("SUCCEEDED", 0, "done"),
        ("STOPPED", None, "stopped"),
        ("FAILED", 75, "stopped"),
        ("FAILED", 130, "stopped"),
        ("FAILED", 1, "failed"),
        ("FAILED", None, "failed"),
    ],
)
def test_states(status: str, exit_code: int | None, word: str) -> None:
    assert job_record.state_word(record(status, exit_code=exit_code)) == word


@pytest.mark.parametrize(
    ("status", "facts", "told", "code", "says"),
    [
        ("SUCCEEDED", {"exit_code": 0}, 0, 0, "a: done"),
        ("STOPPED", {}, 75, 75, "stopped as asked"),
        ("STOPPED", {}, 130, 130, "stopped at once"),
        ("STOPPED", {}, None, 1, "before it could finish its step and save .*grace_s=30 s"),
        ("FAILED", {"exit_code": 2}, 2, 2, "failed, exit code 2"),
        ("FAILED", {"exit_code": 137}, None, 137, "failed, exit code 137"),
        ("FAILED", {"exit_code": 127}, None, 1, "no such Python in its PATH.*--python"),
        (
            "FAILED",
            {
                "error_type": "RUNTIME_ENV_SETUP_FAILURE",
                "message": "runtime_env setup failed: Traceback:\n  File x\nERROR: No matching\n",
            },
            None,
            1,
            "a: the cluster could not set up the job's runtime env: ERROR: No matching",
        ),
        ("FAILED", {"error_type": "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE"}, None, 1, "no node that"),
        ("FAILED", {"message": "odd"}, None, 1, "the job failed to run: odd"),
    ],
)
def test_endings(
    status: str, facts: dict[str, Any], told: int | None, code: int, says: str
) -> None:
    ending: Ending = job_record.ending_of(record(status, **facts), told)
    assert ending.exit_code == code
    assert ending.is_error is (code not in (0, 75, 130))
    assert "\n" not in ending.sentence
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(ending.sentence)


@given(cuts=st.lists(st.integers(0, len(LOG)), max_size=8), again=st.integers(0, len(LOG)))
def test_log_is_shown_once_however_it_comes(cuts: list[int], again: int) -> None:
    log = JobLog()
    edges = sorted({0, *cuts, again})
    lines: list[str] = []
    for begin, end in itertools.pairwise(edges):
        lines += log.feed(LOG[begin:end])
    log.rewind()
    for begin, end in zip([0, again], [again, len(LOG)], strict=True):
        lines += log.feed(LOG[begin:end])
    assert [*lines, *log.finish()] == SHOWN
    assert log.exit_code == 75


def test_log_from_a_place_on_and_without_an_end() -> None:
    log = JobLog(seen_chars=LOG.index("saved"))
    assert log.feed(LOG + "rest") == SHOWN[2:]
    assert log.finish() == ["rest"]
    assert log.finish() == []
    seen = JobLog(seen_chars=len(LOG))
    assert seen.feed(LOG) == []
    assert seen.exit_code == 75


def test_facts_in_a_log() -> None:
    assert job_record.told_exit_code(LOG) == 75
    assert job_record.told_exit_code("") is None
    assert job_record.last_step(LOG) == 12
    assert job_record.last_step("nothing yet") is None


def test_close_ids() -> None:
    known = ["everstep-demo-20261122-0130-ab12", "everstep-demo-20261122-0131-cd34", "job-b"]
    assert job_record.close_ids("ab12", known) == [known[0]]
    assert job_record.close_ids("job-bb", known) == ["job-b"]
    assert job_record.close_ids("", known) == []


def test_who_writes_to_a_run_directory() -> None:
    records = [
        record("STOPPED", id="old", started_s=1.0),
        record("RUNNING", id="new", started_s=2.0),
        record("RUNNING", id="other", metadata={"everstep_run_dir": "/other"}),
    ]
    writer, newest = job_record.writer_of("/r", records), job_record.newest_of("/r", records)
    assert writer is not None
    assert newest is not None
    assert (writer.id, newest.id) == ("new", "new")
    assert job_record.writer_of("/r", records[:1]) is None
    assert job_record.newest_of("/nowhere", records) is None


def test_table_has_our_jobs_newest_first() -> None:
    rows = job_record.table_rows(
        [
            record("STOPPED", id="old", started_s=1.0, ended_s=5.0),
            record("RUNNING", id="new", started_s=2.0),
            record("RUNNING", id="theirs", metadata={}),
        ]
    )
    assert [row[:2] for row in rows] == [("ID", "STATE"), ("new", "running"), ("old", "stopped")]
    assert rows[1][3:] == ("small", "/r")
