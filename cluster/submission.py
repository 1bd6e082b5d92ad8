"""What is sent to a cluster to run a config there: pure functions of plain data, without Ray."""

import math
import posixpath
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from everstep.trainer.commands import RESUBMIT_VARIABLE
from everstep.trainer.config import RunConfig
from everstep.trainer.errors import ConfigError

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Where Ray's own commands find the address too, in their order."""
DASHBOARD_PORT = 8265
LAUNCHER = "ray"
STAGED_CONFIG = ".everstep/config.yaml"
STAGED_ENTRY = ".everstep/job.py"
STOP_MARGIN_S = 30
"""What a stopped run may take beyond ``train.grace_s``: to let ranks go, and to end Python."""
STOP_WAIT_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
"""Ray's job supervisor reads it from its own environment, which is the job's; then it kills."""
KEY_PREFIX = "everstep_"
"""Of our keys in the metadata that Ray stores with a job."""
_KEYWORDS = frozenset({"stdlib", "bytes", "auto"})
_LONGEST_NAME = 40


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job as the job server takes it."""

    job_id: str
    entrypoint: str
    metadata: Mapping[str, str]
    env: Mapping[str, str]
    pip: tuple[str, ...]
    archive: Path


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for, checked."""

    ref: str
    overrides: tuple[str, ...]
    run_dir: str
    nproc: int | None
    resume: str
    python: str
    env: Mapping[str, str]
    pip: tuple[str, ...]
    working_dir: str | None
    exclude: tuple[str, ...]
    address: str | None
    """As given on the command line; None where the environment names it."""


def dashboard_address(asked: str | None, environment: Mapping[str, str]) -> str:
    """'http://host:port' of the cluster's dashboard, from ``--address`` or else the environment.

    Raises ConfigError where there is none, or where it is the address of something else.
    """
    source, address = "--address", asked
    for variable in ADDRESS_VARIABLES:
        if not address and environment.get(variable):
            source, address = variable, environment[variable]
    example = "http://HEAD:8265, as `ray start --head` prints it"
    if not address:
        raise ConfigError(
            f"no cluster is named: add --address, the dashboard of its head node ({example}), or "
            f"set {ADDRESS_VARIABLES[0]}"
        )
    scheme, separator, _ = address.partition("://")
    if separator and scheme == "ray":
        raise ConfigError(
            f"{source}={address} is the address of a Ray client connection, and jobs are submitted "
            f"to the dashboard: {example}"
        )
    if (separator and scheme not in ("http", "https")) or address in ("auto", "local"):
        raise ConfigError(f"{source}={address}: expected the address of a dashboard: {example}")
    try:
        parts = urlsplit(address if separator else f"http://{address}")
        port = parts.port
    except ValueError as error:
        raise ConfigError(
            f"{source}={address} is no address ({error}): expected {example}"
        ) from None
    if not parts.hostname:
        raise ConfigError(f"{source}={address} names no host: expected {example}")
    if port is None and not separator:
        parts = parts._replace(netloc=f"{parts.netloc}:{DASHBOARD_PORT}")
    return parts._replace(query="", fragment="").geturl().rstrip("/")


def check_run_dir(run_dir: Path | None, name: str) -> str:
    """The run directory on the cluster. Raises ConfigError unless it is an absolute path."""
    example = f"such as --run-dir /shared/runs/{name}"
    if run_dir is None:
        raise ConfigError(
            "a submitted run needs --run-dir: an absolute path on storage that every node of the "
            f"cluster sees, {example}"
        )
    if not run_dir.is_absolute():
        raise ConfigError(
            f"--run-dir {run_dir} is relative to a folder that ends with the job: name an absolute "
            f"path on storage that every node of the cluster sees, {example}"
        )
    return posixpath.normpath(str(run_dir))


def parse_env(entries: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """``NAME=VALUE``, or ``NAME`` for the value that it has here. Raises ConfigError."""
    found: dict[str, str] = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"--env {entry!r}: expected NAME=VALUE, or NAME of a variable here")
        if not equals:
            if name not in environment:
                raise ConfigError(f"--env {name}: it is not set here; give it as {name}=VALUE")
            value = environment[name]
        found[name] = value
    return found


def new_job_id(name: str, now: datetime, salt: str) -> str:
    """'everstep-demo-20261122-0130-ab12': sorts by time, and is safe in URLs and file names."""
    short = re.sub(r"[^A-Za-z0-9-]+", "-", name)[:_LONGEST_NAME].strip("-") or "run"
    return f"everstep-{short}-{now:%Y%m%d-%H%M}-{salt}"


def check_job_id(job_id: str) -> str:
    """Raise ConfigError unless Ray and file systems take it as a name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", job_id):
        raise ConfigError(
            f"--id {job_id!r}: expected letters, digits, '-', '_' and '.', at most 128 of them"
        )
    return job_id


def entrypoint(request: Request, version: str) -> str:
    """The shell command that Ray runs on the head node."""
    words = [request.python, STAGED_ENTRY, version, "train", STAGED_CONFIG, "--launcher", LAUNCHER]
    words += ["--run-dir", request.run_dir, "--resume", request.resume]
    if request.nproc is not None:
        words += ["--nproc", str(request.nproc)]
    return f"exec {shlex.join(words)}"


def resubmit_command(request: Request) -> str:
    """The command that goes on with this run; of ``--env`` only names, whose values are secrets."""
    words = ["everstep", "submit", request.ref, *request.overrides, "--run-dir", request.run_dir]
    if request.address is not None:
        words += ["--address", request.address]
    if request.nproc is not None:
        words += ["--nproc", str(request.nproc)]
    if request.python != "python":
        words += ["--python", request.python]
    if request.working_dir is not None:
        words += ["--working-dir", request.working_dir]
    for option, values in (("exclude", request.exclude), ("pip", request.pip)):
        words += [word for value in values for word in (f"--{option}", value)]
    words += [word for name in sorted(request.env) for word in ("--env", name)]
    return shlex.join(words)


def plan_submission(
    request: Request, config: RunConfig, job_id: str, version: str, archive: Path
) -> Submission:
    """Everything that is sent, but for the contents of the archive."""
    command = resubmit_command(request)
    wait_s = math.ceil(config.train.grace_s) + STOP_MARGIN_S
    facts = {
        "run": config.name,
        "run_dir": request.run_dir,
        "steps": str(config.train.steps),
        "grace_s": f"{config.train.grace_s:g}",
        "version": version,
        "command": command,
    }
    return Submission(
        job_id=job_id,
        entrypoint=entrypoint(request, version),
        metadata={f"{KEY_PREFIX}{key}": value for key, value in facts.items()},
        env={**request.env, STOP_WAIT_VARIABLE: str(wait_s), RESUBMIT_VARIABLE: command},
        pip=request.pip,
        archive=archive,
    )


def in_job(config: RunConfig) -> RunConfig:
    """The run as the job is to have it: in the cluster that it was submitted to, no other one."""
    launch = config.launch.model_copy(update={"address": None})
    return config.model_copy(update={"launch": launch})


def relative_inputs(config: RunConfig) -> list[tuple[str, str]]:
    """(key, path or glob) of every input that is named relative to the working directory."""
    data: dict[str, Any] = config.model_dump()["data"]
    named = [("data.source", text) for text in _texts(data["source"])]
    named += [("data.tokenizer", text) for text in _texts(data["tokenizer"])]
    named += [("model.init_from", text) for text in _texts(config.model.init_from)]
    return [
        (key, text)
        for key, text in named
        if text not in _KEYWORDS and "://" not in text and not text.startswith(("/", "~"))
    ]


def check_input(key: str, text: str, matches: Sequence[str], staged: Collection[str]) -> None:
    """Raise ConfigError unless a relative input is among the files that go along.

    ``matches``: what ``text`` means in the folder, as relative paths; ``staged``: names of files.
    """
    elsewhere = (
        "name it by an absolute path on storage that every node sees, or by a URL, or put it into "
        "the folder that is sent"
    )
    if posixpath.normpath(text).startswith(".."):
        raise ConfigError(f"{key}: {text!r} is outside of the folder that is sent: {elsewhere}")
    if not matches:
        raise ConfigError(f"{key}: there is no {text!r} in the folder that is sent: {elsewhere}")
    names = [posixpath.normpath(match) for match in matches]
    if not any(
        name == file or name == "." or file.startswith(f"{name}/")
        for name in names
        for file in staged
    ):
        raise ConfigError(
            f"{key}: {text!r} is left out of what is sent (hidden, or excluded): {elsewhere}"
        )


def _texts(value: Any) -> Iterator[str]:
    """The paths in ``data.source``: text, lists of it, or entries with a ``path``."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts(value.get("path"))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
