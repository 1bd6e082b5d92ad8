"""Start and stop keepers, and ask them how they are."""

import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import everstep
from everstep.checkpoint.errors import KeeperError
from everstep.checkpoint.keeper.carried import decode_error
from everstep.checkpoint.keeper.main import MODULE
from everstep.checkpoint.keeper.place import KeeperPlace, is_absence, jobs_in
from everstep.checkpoint.keeper.transport import address_of
from everstep.checkpoint.keeper.wire import Channel, WireError

DEFAULT_LINGER_S = 900.0
_POLL_S = 0.02
_LOG_BYTES = 2**20


def start(
    job: str,
    *,
    place: Path | None = None,
    budget_bytes: int | None = None,
    linger_s: float = DEFAULT_LINGER_S,
    interface: str | None = None,
    timeout_s: float = 60.0,
    module: str = MODULE,
) -> bool:
    """Start a keeper that outlives this process, and wait until it answers.

    Args:
        job: its name.
        place: the directory of sockets; None: the default.
        budget_bytes: memory for all slots; None: 80 % of what is available now.
        linger_s: how long it stays without any trainer.
        interface: of the network on which other nodes of the job may read snapshots; None: they
            may not.
        timeout_s: how long its answer is waited for.
        module: that runs it.

    Returns:
        False where it is running already.

    Raises:
        KeeperError: it does not come up, or the place is not safe.
    """
    if interface is not None:
        address_of(interface)
    where = KeeperPlace.of(job, place)
    where.make()
    if where.is_held():
        _wait_for_answer(where, timeout_s)
        return False
    command = command_line(
        where, budget_bytes=budget_bytes, linger_s=linger_s, interface=interface, module=module
    )
    with open(where.log, "ab") as log:
        os.chmod(where.log, 0o600)
        if log.tell() > _LOG_BYTES:
            log.truncate(0)
        # the first process forks and ends, so that nobody has to wait for the keeper
        subprocess.run(
            [*command, "--detach"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=environment(),
            start_new_session=True,
            check=False,
            timeout=timeout_s,
        )
    _wait_for_answer(where, timeout_s)
    return True


def command_line(
    where: KeeperPlace,
    *,
    budget_bytes: int | None,
    linger_s: float,
    interface: str | None = None,
    module: str = MODULE,
) -> list[str]:
    """What starts a supervisor."""
    if budget_bytes is None:
        from everstep.checkpoint.keeper.segments import default_budget_bytes

        budget_bytes = default_budget_bytes()
    flags = [
        "--role=supervisor",
        f"--job={where.job}",
        f"--place={where.root}",
        f"--budget-bytes={budget_bytes}",
        f"--linger-s={linger_s}",
    ]
    if interface is not None:
        flags.append(f"--interface={interface}")
    return [sys.executable, "-m", module, *flags]


def environment() -> dict[str, str]:
    """The variables of a keeper: those of this process, and where this package is found."""
    root = str(Path(everstep.__file__).absolute().parent.parent)
    known = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{known}" if known else root}


def stop(
    job: str, *, place: Path | None = None, now: bool = False, timeout_s: float = 600.0
) -> bool:
    """Have a keeper make durable what is newest, and end; returns when nothing of it is left.

    Args:
        job: its name.
        place: the directory of sockets; None: the default.
        now: end at once; what is in memory is lost.
        timeout_s: how long to wait.

    Returns:
        False where there is none.

    Raises:
        KeeperError: it has not ended in time, or is not to be reached.
    """
    where = KeeperPlace.of(job, place)
    deadline_s = time.monotonic() + timeout_s
    answer = ask(where, {"do": "stop", "now": now}, timeout_s=min(30.0, timeout_s))
    while where.is_held():
        if time.monotonic() > deadline_s:
            raise KeeperError(
                f"the keeper of job {job} has not ended within {timeout_s:g} s: see {where.log}, "
                "or end it with --now, which loses what is not durable yet"
            )
        time.sleep(_POLL_S)
    return answer is not None


def status(
    job: str, *, place: Path | None = None, timeout_s: float = 10.0
) -> dict[str, Any] | None:
    """How the keeper of a job is; None where there is none.

    Raises:
        KeeperError: it does not answer.
    """
    found = ask(KeeperPlace.of(job, place), {"do": "status"}, timeout_s=timeout_s)
    return None if found is None else {"job": job, **found}


def all_status(place: Path | None = None) -> list[dict[str, Any]]:
    """How all keepers of a place are."""
    found = (status(job, place=place) for job in jobs_in(place))
    return [each for each in found if each is not None]


def ask(where: KeeperPlace, body: dict[str, Any], *, timeout_s: float) -> dict[str, Any] | None:
    """One request, on a connection of its own; None where no keeper is.

    Raises:
        KeeperError: it does not answer in time; or its own error.
    """
    deadline_s = time.monotonic() + timeout_s
    try:
        connection = where.connect()
    except OSError as error:
        if is_absence(error):
            return None
        raise
    channel = Channel(connection)
    poll = select.poll()  # select() knows the first 1024 descriptors only
    poll.register(channel, select.POLLIN)
    try:
        channel.send({"id": 1, **body})
        while poll.poll(1000 * max(0.0, deadline_s - time.monotonic())):
            for frame in channel.receive():
                frame.close()
                if "error" in frame.body:
                    raise decode_error(frame.body["error"])
                found: dict[str, Any] = frame.body["result"]
                return found
    except (EOFError, OSError, WireError) as error:
        raise KeeperError(
            f"the keeper of job {where.job} ended while it was asked ({type(error).__name__}): see "
            f"{where.log}"
        ) from None
    finally:
        channel.close()
    raise KeeperError(
        f"the keeper of job {where.job} has not answered within {timeout_s:g} s: see {where.log}"
    )


def _wait_for_answer(where: KeeperPlace, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    was_held = False
    while time.monotonic() < deadline_s:
        try:
            if ask(where, {"do": "status"}, timeout_s=timeout_s) is not None:
                return
        except KeeperError:  # it was there
            was_held = True
        is_held = where.is_held()
        if was_held and not is_held:
            break  # it has given up
        was_held = is_held
        time.sleep(_POLL_S)
    lines = where.log.read_text(errors="replace").splitlines()[-3:] if where.log.exists() else []
    raise KeeperError(
        f"the keeper of job {where.job} does not come up; mend what the end of {where.log} says: "
        f"{' | '.join(lines) or 'nothing'}"
    )
