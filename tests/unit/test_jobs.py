"""submit, status, logs and stop: what is sent, what is printed, the exit codes."""

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from everstep.checkpoint.errors import EverstepError
from everstep.cluster import ray_submit
from everstep.cluster.job_errors import ClusterUnreachableError
from everstep.cluster.job_record import JobRecord
from everstep.trainer.config_load import parse_config
from tests.support.cli import exit_code
from tests.support.fake_jobs import ADDRESS, FakeJobServer

CONFIG = "name: small\ntrain: {steps: 5, grace_s: 7}\ndata: {source: [text/*.txt]}\n"
FACTS = {
    "everstep_run": "small",
    "everstep_run_dir": "/shared/r",
    "everstep_steps": "40",
    "everstep_grace_s": "7",
    "everstep_command": "everstep submit run.yaml --run-dir /shared/r",
}
LOG = "step 12/40 · loss 1.0\nstopped, step 12 is saved\neverstep job ended with exit code 75\n"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeJobServer:
    fake = FakeJobServer()

    def open_server(address: str) -> FakeJobServer:
        assert address == ADDRESS
        return fake

    monkeypatch.setattr(ray_submit, "RayJobServer", open_server)
    for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)
    return fake


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a config, a text, a module."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("words")
    (tmp_path / "my_model.py").write_text("x = 1\n")
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> int:
    return exit_code(*arguments, "--address", ADDRESS)


def submit(*arguments: str) -> int:
    return run("submit", "run.yaml", "--run-dir", "/shared/r", *arguments)


def record(status: str, **facts: Any) -> JobRecord:
    return JobRecord(**{"id": "job-a", "status": status, "metadata": FACTS, **facts})


def words(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_submit_sends_config_and_code(
    server: FakeJobServer, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit("optim.lr=1e-4", "--detach", "--env", "A=1", "--id", "job-x") == 0
    (sent,) = server.submitted
    with zipfile.ZipFile(io.BytesIO(server.archives[0])) as archive:
        assert sorted(archive.namelist()) == [
            ".everstep/config.yaml", ".everstep/job.py", "my_model.py", "run.yaml", "text/a.txt",
        ]  # fmt: skip
        config = parse_config(archive.read(".everstep/config.yaml").decode(), "sent")
    assert config.optim.lr == 1e-4
    assert "--run-dir /shared/r" in sent.entrypoint
    assert sent.env["A"] == "1"
    out, _ = words(capsys)
    assert out.startswith("submitted job-x to http://head:8265, with 3 files")
    assert f"follow: everstep logs job-x --follow --address {ADDRESS}" in out


def test_submit_follows_to_the_end(
    server: FakeJobServer, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.outputs["job-x"] = "step 5/5\neverstep job ended with exit code 0\n"
    assert submit("--id", "job-x", "model.init_from=text@3") == 0
    assert words(capsys)[0].splitlines()[1:] == ["step 5/5", "job-x: done"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["optim.lrr=1"], 2, "unknown key optim.lrr"),
        (["--resume", "latest"], 2, "--resume: got 'latest'"),
        (["--nproc", "3", "mesh.dp_shard=2"], 2, "the mesh"),
        (["data.source=../x"], 2, "outside of the folder"),
        (["model.init_from=none@3"], 2, "there is no 'none' in the folder that is sent"),
        (["--exclude", "text"], 2, "is left out of what is sent"),
        (["--env", "NOT_SET_HERE"], 2, "--env NOT_SET_HERE"),
        (["--id", "a/b"], 2, "--id 'a/b'"),
        (["--working-dir", "absent"], 1, "is no folder"),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_sent(
    server: FakeJobServer,
    project: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: Sequence[str],
    code: int,
    says: str,
) -> None:
    assert submit(*arguments) == code
    assert says in words(capsys)[1]
    assert server.submitted == []


def test_one_job_per_run_directory(
    server: FakeJobServer, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.records["job-a"] = record("RUNNING")
    assert submit("--detach") == 1
    assert "/shared/r is being written by job job-a: stop that first" in words(capsys)[1]
    server.change("job-a", "STOPPED")
    assert submit("--detach") == 0
    assert "is that of job-a (stopped): goes on from its newest checkpoint" in words(capsys)[0]
    assert submit("--detach", "--id", "job-a") == 1
    assert "has a job of this id already" in words(capsys)[1]


def test_ctrl_c_leaves_the_job_alone(
    server: FakeJobServer,
    project: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    server.on_get = interrupted
    assert submit("--id", "job-x") == 130
    out, _ = words(capsys)
    assert "no longer following; the job goes on: job-x" in out
    assert "stop:   everstep stop job-x" in out
    assert server.stopped == []


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_following_ends_with_the_exit_code_of_the_job(
    server: FakeJobServer, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    server.records["job-a"] = record("FAILED" if code else "SUCCEEDED", exit_code=code)
    server.outputs["job-a"] = f"a line\neverstep job ended with exit code {code}\n"
    assert run("logs", "job-a", "--follow") == code
    out, err = words(capsys)
    assert out.splitlines()[0] == "a line"
    assert ("failed" in err) is (code in (1, 2))


def test_logs_of_now(server: FakeJobServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.records["job-a"] = record("RUNNING")
    server.outputs["job-a"] = "Running entrypoint for job a: x\nstep 1/40\npart of a li"
    assert run("logs", "job-a") == 0
    assert words(capsys)[0] == "step 1/40\npart of a li\n"


def test_status_lists_our_jobs(server: FakeJobServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("status") == 0
    assert "no run has been submitted" in words(capsys)[0]
    server.records["job-a"] = record("RUNNING", started_s=1.0)
    server.records["theirs"] = JobRecord(id="theirs", status="RUNNING")
    assert run("status") == 0
    out, _ = words(capsys)
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["ID", "STATE"],
        ["job-a", "running"],
    ]
    assert run("status", "--json") == 0
    (plain,) = json.loads(words(capsys)[0])
    assert (plain["id"], plain["state"], plain["exit_code"]) == ("job-a", "running", None)


def test_status_of_one_job(server: FakeJobServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.records["job-a"] = record("STOPPED", started_s=1.0, ended_s=2.0)
    server.outputs["job-a"] = LOG
    assert run("status", "job-a") == 0
    out, _ = words(capsys)
    for line in ("state:     stopped", "step:      12 of 40", "exit code: 75", "last lines:"):
        assert line in out
    assert run("status", "job-a", "--json") == 0
    assert json.loads(words(capsys)[0])["exit_code"] == 75
    assert run("status", "job-b") == 1
    assert "no job 'job-b'; did you mean job-a?" in words(capsys)[1]


@pytest.mark.parametrize(("now", "pid"), [(False, 7), (True, 7), (True, None)])
def test_stop_shows_how_it_ended(
    server: FakeJobServer, capsys: pytest.CaptureFixture[str], now: bool, pid: int | None
) -> None:
    server.records["job-a"] = record("RUNNING", driver_pid=pid)
    server.outputs["job-a"] = LOG
    server.on_get = lambda: server.change("job-a", "STOPPED") if server.stopped else None
    assert run("stop", "job-a", *["--now"] * now) == 0
    assert server.stopped == ["job-a"]
    assert server.interrupted == ["job-a"] * (now and pid is not None)
    out, _ = words(capsys)
    assert "job-a: stopped as asked, exit code 75" in out
    assert ("in at most 7 s" in out) is not now
    assert run("stop", "job-a") == 0
    assert "job-a has ended already: stopped" in words(capsys)[0]


def test_a_job_that_had_to_be_killed(
    server: FakeJobServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.records["job-a"] = record("RUNNING")
    server.on_get = lambda: server.change("job-a", "STOPPED") if server.stopped else None
    assert run("stop", "job-a") == 1
    assert "was ended before it could finish its step and save" in words(capsys)[1]


def test_jobs_of_others_are_left_alone(
    server: FakeJobServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.records["theirs"] = JobRecord(id="theirs", status="RUNNING")
    assert run("stop", "theirs") == 1
    assert "theirs was not submitted by everstep" in words(capsys)[1]
    assert server.stopped == []


def test_errors_of_the_connection_end_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(address: str) -> EverstepError:
        raise ClusterUnreachableError(address, "connection refused")

    monkeypatch.setattr(ray_submit, "RayJobServer", refuse)
    assert run("status") == 1
    assert "no cluster answers at http://head:8265 (connection refused)" in words(capsys)[1]
