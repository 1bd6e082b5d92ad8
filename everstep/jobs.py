"""``everstep submit``, ``status``, ``logs`` and ``stop``: what they do, and what they print."""

import glob
import json
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.text import Text

from everstep import __version__
from everstep.checkpoint.errors import EverstepError
from everstep.cluster import exit_codes, job_entry
from everstep.cluster.job_errors import ConnectionLostError, ForeignJobError, RunDirTakenError
from everstep.cluster.job_follow import Follower
from everstep.cluster.job_record import (
    PENDING,
    JobLog,
    JobRecord,
    JobServer,
    as_plain,
    ending_of,
    last_step,
    local_time,
    newest_of,
    state_word,
    table_rows,
    told_exit_code,
    writer_of,
)
from everstep.cluster.staging import StagedFile, staged_files, write_archive
from everstep.cluster.submission import (
    STAGED_CONFIG,
    STAGED_ENTRY,
    STOP_MARGIN_S,
    Request,
    check_input,
    check_job_id,
    dashboard_address,
    in_job,
    new_job_id,
    plan_submission,
    relative_inputs,
)
from everstep.launch import check_resume
from everstep.trainer.config import RunConfig
from everstep.trainer.config_load import dump_config, load_config
from everstep.trainer.mesh_shape import check_config, resolve_mesh, world_size_of
from everstep.trainer.progress import short_bytes
from everstep.words import plural

_LAST_LINES = 8


def submit(
    request: Request,
    *,
    job_id: str | None,
    follow: bool,
    environment: Mapping[str, str],
) -> int:
    """Check the run here, send it, and (``follow``) show it until it ends; returns the exit code.

    Raises ConfigError and the errors of ``cluster/job_errors.py``; nothing is submitted then.
    """
    check_resume(request.resume)
    config = load_config(request.ref, request.overrides)
    check_config(config, resolve_mesh(config.mesh, world_size_of(config.mesh, request.nproc, 0)))
    address = dashboard_address(request.address, environment)
    if job_id is None:
        job_id = new_job_id(config.name, datetime.now(), secrets.token_hex(2))
    check_job_id(job_id)
    folder = Path(request.working_dir or ".")
    files = staged_files(folder, request.exclude, never=Path(request.run_dir))
    _check_inputs(config, folder, files)

    server = _open(address)
    known = server.jobs()
    writer = writer_of(request.run_dir, known)
    if writer is not None:
        raise RunDirTakenError(request.run_dir, writer.id)
    with tempfile.TemporaryDirectory(prefix="everstep-") as temporary:
        archive = Path(temporary) / "job.zip"
        texts = {
            STAGED_CONFIG: dump_config(in_job(config)),
            STAGED_ENTRY: Path(job_entry.__file__).read_text(encoding="utf-8"),
        }
        write_archive(archive, files, texts)
        server.submit(plan_submission(request, config, job_id, __version__, archive))
    _say(_submitted(job_id, address, files))
    before = newest_of(request.run_dir, known)
    if before is not None and request.resume == "auto":
        _say(
            f"  {request.run_dir} is that of {before.id} ({state_word(before)}): goes on from its "
            "newest checkpoint, if it has one"
        )
    if not follow:
        for line in _next_commands(job_id, request.address):
            _say(line)
        return exit_codes.DONE
    return _follow(server, job_id, request.address)


def status(
    job_id: str | None, *, address: str | None, as_json: bool, environment: Mapping[str, str]
) -> None:
    """Print the runs that were submitted to a cluster, or one of them in detail."""
    server = _open(dashboard_address(address, environment))
    if job_id is not None:
        _show_job(server, server.get(job_id), as_json)
        return
    records = server.jobs()
    if as_json:
        ours = [record for record in records if record.is_ours]
        plain = [as_plain(record, record.exit_code, None) for record in ours]
        print(json.dumps(plain, indent=2))
        return
    rows = table_rows(records)
    if len(rows) == 1:
        _say(f"no run has been submitted to {server.address}; `everstep submit --help` shows how")
        return
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        _say("  ".join(cells).rstrip())


def logs(job_id: str, *, address: str | None, follow: bool, environment: Mapping[str, str]) -> int:
    """Print the output of a run so far, or until its end; returns the exit code."""
    server = _open(dashboard_address(address, environment))
    record = server.get(job_id)
    if follow:
        return _follow(server, record.id, address)
    log = JobLog()
    for line in [*log.feed(server.log(record.id)), *log.finish()]:
        _say(line)
    return exit_codes.DONE


def stop(job_id: str, *, address: str | None, now: bool, environment: Mapping[str, str]) -> int:
    """Have a run end, and show how it does; 0 when it stopped, 1 when it had to be killed."""
    server = _open(dashboard_address(address, environment))
    record = server.get(job_id)
    if not record.is_ours:
        raise ForeignJobError(record.id)
    if record.ended:
        _say(f"{record.id} has ended already: {state_word(record)}")
        return exit_codes.DONE
    seen_chars = 0 if record.status == PENDING else len(server.log(record.id))
    server.stop(record.id)
    limit_s = record.grace_s + STOP_MARGIN_S
    if not now:
        _say(f"{record.id}: finishes its step and saves, in at most {record.grace_s:g} s")
    elif record.driver_pid is not None:
        _say(f"{record.id}: stops at once")
        server.interrupt(record)
    follower = Follower(server, record.id, show=_say, notice=_say, seen_chars=seen_chars)
    try:
        ended = follower.follow(limit_s + STOP_MARGIN_S)
    except KeyboardInterrupt:
        _say(f"{record.id} is stopping all the same; see: everstep status {record.id}")
        return exit_codes.INTERRUPTED
    if ended is None:
        _complain(
            f"{record.id} has not ended after {limit_s:g} s: see `everstep status {record.id}`"
        )
        return exit_codes.FAILED
    code = _tell_end(ended, follower.told_exit_code)
    asked_for = (exit_codes.DONE, exit_codes.STOPPED, exit_codes.INTERRUPTED)
    return exit_codes.DONE if code in asked_for else exit_codes.FAILED


def _open(address: str) -> JobServer:
    from everstep.cluster.ray_submit import RayJobServer

    return RayJobServer(address)


def _check_inputs(config: RunConfig, folder: Path, files: Sequence[StagedFile]) -> None:
    """Inputs that are named relative to the folder have to be in what is sent of it."""
    names = {file.name for file in files}
    for key, text in relative_inputs(config):
        exists = (folder / text).exists()
        if not exists and key == "model.init_from":
            from everstep.checkpoint.open_place import without_step

            text = without_step(text)
        matches = [text] if exists else glob.glob(text, root_dir=folder, recursive=True)
        check_input(key, text, matches, names)


def _submitted(job_id: str, address: str, files: Sequence[StagedFile]) -> str:
    size = short_bytes(sum(file.size_bytes for file in files))
    return f"submitted {job_id} to {address}, with {plural(len(files), 'file')} ({size}) of code"


def _next_commands(job_id: str, address: str | None) -> list[str]:
    """What can be done with a job now; ``address`` only where it was not in the environment."""
    where = "" if address is None else f" --address {address}"
    return [
        f"  follow: everstep logs {job_id} --follow{where}",
        f"  look:   everstep status {job_id}{where}",
        f"  stop:   everstep stop {job_id}{where}",
    ]


def _follow(server: JobServer, job_id: str, address: str | None) -> int:
    follower = Follower(server, job_id, show=_say, notice=_complain)
    try:
        record = follower.follow()
    except KeyboardInterrupt:
        _say(f"no longer following; the job goes on: {job_id}")
        for line in _next_commands(job_id, address):
            _say(line)
        return exit_codes.INTERRUPTED
    except ConnectionLostError as error:
        _complain(f"error: {error}")
        for line in _next_commands(job_id, address):
            _complain(line)
        return exit_codes.FAILED
    assert record is not None
    return _tell_end(record, follower.told_exit_code)


def _tell_end(record: JobRecord, told: int | None) -> int:
    ending = ending_of(record, told)
    if ending.is_error:
        _complain(f"error: {ending.sentence}")
    else:
        _say(ending.sentence)
    return ending.exit_code


def _show_job(server: JobServer, record: JobRecord, as_json: bool) -> None:
    try:
        log = server.log(record.id)
    except EverstepError:
        log = ""  # the node that has it is gone
    code = ending_of(record, told_exit_code(log)).exit_code if record.ended else None
    step = last_step(log)
    if as_json:
        print(json.dumps(as_plain(record, code, step), indent=2))
        return
    steps = record.fact("steps")
    facts = [
        ("state", state_word(record)),
        ("run", record.fact("run")),
        ("directory", record.fact("run_dir")),
        ("step", "" if step is None else f"{step} of {steps}" if steps else str(step)),
        ("started", "" if record.started_s is None else local_time(record.started_s)),
        ("ended", "" if record.ended_s is None else local_time(record.ended_s)),
        ("exit code", "" if code is None else str(code)),
        ("again", record.fact("command")),
        ("Ray says", record.message if record.status == PENDING else ""),
    ]
    _say(record.id)
    for name, value in facts:
        if value:
            _say(f"  {name + ':':<11}{value}")
    if record.ended and code not in (exit_codes.DONE, exit_codes.STOPPED):
        _say(f"  {'why:':<11}{ending_of(record, told_exit_code(log)).sentence}")
    shown = JobLog()
    lines = [*shown.feed(log), *shown.finish()]
    if lines:
        _say("  last lines:")
        for line in lines[-_LAST_LINES:]:
            _say(f"    {line}")


def _say(text: str) -> None:
    Console().print(Text(text), soft_wrap=True)


def _complain(text: str) -> None:
    Console(stderr=True).print(Text(text), soft_wrap=True)
