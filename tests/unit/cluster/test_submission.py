"""What is sent to a cluster: addresses, ids, the command line, what relative paths may name."""

import shlex
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from everstep.cluster import submission
from everstep.cluster.submission import Request
from everstep.trainer.config_load import parse_config
from everstep.trainer.errors import ConfigError


def request(**changes: Any) -> Request:
    facts: dict[str, Any] = {
        "ref": "my.yaml",
        "overrides": ("optim.lr=1e-3",),
        "run_dir": "/shared/a b",
        "nproc": None,
        "resume": "auto",
        "python": "python",
        "env": {},
        "pip": (),
        "working_dir": None,
        "exclude": (),
        "address": None,
    }
    return Request(**{**facts, **changes})


@pytest.mark.parametrize(
    ("asked", "environment", "expected"),
    [
        ("http://head:8265", {}, "http://head:8265"),
        ("http://head:8265/", {}, "http://head:8265"),
        ("https://ray.example.org/cluster-a/", {}, "https://ray.example.org/cluster-a"),
        ("head", {}, "http://head:8265"),
        ("head:9000", {}, "http://head:9000"),
        ("[::1]:9000", {}, "http://[::1]:9000"),
        (None, {"RAY_ADDRESS": "http://b:1"}, "http://b:1"),
        (None, {"RAY_ADDRESS": "b:1", "RAY_API_SERVER_ADDRESS": "http://a:1"}, "http://a:1"),
        ("http://c:1", {"RAY_API_SERVER_ADDRESS": "http://a:1"}, "http://c:1"),
    ],
)
def test_addresses(asked: str | None, environment: dict[str, str], expected: str) -> None:
    assert submission.dashboard_address(asked, environment) == expected


@pytest.mark.parametrize(
    ("asked", "environment", "says"),
    [
        (None, {}, "no cluster is named: add --address"),
        ("ray://head:10001", {}, "--address=ray://head:10001 is the address of a Ray client"),
        (None, {"RAY_ADDRESS": "auto"}, "RAY_ADDRESS=auto: expected the address of a dashboard"),
        ("ftp://head", {}, "expected the address of a dashboard"),
        ("http://head:99999", {}, "is no address"),
        ("http://", {}, "names no host"),
    ],
)
def test_wrong_addresses(asked: str | None, environment: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        submission.dashboard_address(asked, environment)


def test_run_directory_has_to_be_absolute() -> None:
    assert submission.check_run_dir(Path("/shared/x/../y/"), "demo") == "/shared/y"
    with pytest.raises(ConfigError, match=r"needs --run-dir: .* --run-dir /shared/runs/demo"):
        submission.check_run_dir(None, "demo")
    with pytest.raises(ConfigError, match="--run-dir runs/x is relative"):
        submission.check_run_dir(Path("runs/x"), "demo")


def test_environment_by_value_and_by_name() -> None:
    found = submission.parse_env(["A=1=2", "KEY", "EMPTY="], {"KEY": "secret"})
    assert found == {"A": "1=2", "KEY": "secret", "EMPTY": ""}
    with pytest.raises(ConfigError, match="--env OTHER: it is not set here"):
        submission.parse_env(["OTHER"], {})
    with pytest.raises(ConfigError, match="expected NAME=VALUE"):
        submission.parse_env(["1x=2"], {})


def test_ids() -> None:
    now = datetime(2026, 11, 22, 1, 30)
    assert submission.new_job_id("demo", now, "ab12") == "everstep-demo-20261122-0130-ab12"
    odd = submission.new_job_id("a_b.c" * 30, now, "ab12")
    assert submission.check_job_id(odd) == odd
    for wrong in ("", "a/b", "a b", "-x", "x" * 129):
        with pytest.raises(ConfigError, match="--id"):
            submission.check_job_id(wrong)


def test_entrypoint_is_one_shell_command() -> None:
    words = shlex.split(submission.entrypoint(request(nproc=4, resume="20"), "0.1.0"))
    assert words == [
        "exec", "python", ".everstep/job.py", "0.1.0", "train", ".everstep/config.yaml",
        "--launcher", "ray", "--run-dir", "/shared/a b", "--resume", "20", "--nproc", "4",
    ]  # fmt: skip


def test_command_that_goes_on_shows_no_secret_and_parses_back() -> None:
    asked = request(
        address="http://head:8265",
        env={"KEY": "secret"},
        pip=("wandb==1",),
        working_dir="code",
        exclude=("a", "b"),
        nproc=2,
        python="/opt/python",
        resume="20",
    )
    command = submission.resubmit_command(asked)
    assert "secret" not in command
    assert shlex.split(command) == [
        "everstep", "submit", "my.yaml", "optim.lr=1e-3", "--run-dir", "/shared/a b",
        "--address", "http://head:8265", "--nproc", "2", "--python", "/opt/python",
        "--working-dir", "code", "--exclude", "a", "--exclude", "b", "--pip", "wandb==1",
        "--env", "KEY",
    ]  # fmt: skip


def test_the_supervisor_waits_longer_than_the_run_may_take_to_stop() -> None:
    config = parse_config("name: x\ntrain: {steps: 5, grace_s: 90.5}", "test")
    planned = submission.plan_submission(
        request(env={"A": "1"}), config, "id-1", "0.1.0", Path("x.zip")
    )
    assert int(planned.env["RAY_JOB_STOP_WAIT_TIME_S"]) >= 91 + 30
    assert planned.env["A"] == "1"
    assert planned.env["EVERSTEP_RESUBMIT"].startswith("everstep submit my.yaml")
    assert planned.metadata["everstep_run"] == "x"
    assert planned.metadata["everstep_run_dir"] == "/shared/a b"
    assert all(isinstance(value, str) for value in planned.metadata.values())


def test_relative_inputs_are_found() -> None:
    text = (
        "train: {steps: 5}\ndata: {source: [text/*.txt, /shared/x, ~/y, 's3://b/z', stdlib], "
        "tokenizer: tok.json}\nmodel: {init_from: hf}"
    )
    assert submission.relative_inputs(parse_config(text, "test")) == [
        ("data.source", "text/*.txt"),
        ("data.tokenizer", "tok.json"),
        ("model.init_from", "hf"),
    ]
    assert submission.relative_inputs(parse_config("train: {steps: 5}", "test")) == []


def test_relative_inputs_have_to_go_along() -> None:
    staged = {"text/a.txt", "tok.json"}
    submission.check_input("data.source", "text/*.txt", ["text/a.txt"], staged)
    submission.check_input("data.source", "./text/", ["./text/"], staged)
    submission.check_input("data.source", ".", ["."], staged)
    for text, matches, says in (
        ("../text", ["../text"], "is outside of the folder that is sent"),
        ("x/../../y", ["x/../../y"], "is outside of the folder that is sent"),
        ("none/*.txt", [], "there is no 'none/"),
        (".hidden", [".hidden"], "is left out of what is sent"),
    ):
        with pytest.raises(ConfigError, match=says):
            submission.check_input("data.source", text, matches, staged)
