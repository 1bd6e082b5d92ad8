"""A process that serves the ranks of a run and never outlives the controller that started it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from everstep.cluster import worker_shell
from everstep.cluster.driver import RankExit
from everstep.cluster.errors import LaunchError
from everstep.cluster.stop_signals import signals_held_back
from everstep.trainer.rank_spec import Report

_BOOT = (
    "import json, sys; setup = json.loads(sys.argv[1]); sys.path[:] = setup['path']; "
    "from everstep.cluster.helper import main; main(setup)"
)
_READ_BYTES = 1 << 16


class Helper:
    """Runs "module:function" in a process of its own until it is closed; a context manager.

    The function gets ``subject``, or else ``listener`` if there is one, and may report. Without
    ``last_act`` the process is killed when the *thread* that created this object ends.

    Args:
        name: what it is, for a person: 'the rendezvous store'.
        target: "module:function", see ``worker_shell.py``.
        log: file for what it writes.
        subject: plain data for the function.
        listener: a socket for the function; this process may close it afterwards.
        environment: variables to set in it.
        last_act: "module:function" that gets ``subject`` when the helper is closed, or this process
            is gone, just before the helper ends; without it the kernel kills the helper then.

    Raises LaunchError.
    """

    def __init__(
        self,
        name: str,
        target: str,
        log: Path,
        *,
        subject: Any = None,
        listener: socket.socket | None = None,
        environment: Mapping[str, str] | None = None,
        last_act: str | None = None,
    ) -> None:
        self._name = name
        self._log = log
        self._has_last_act = last_act is not None
        self._received = b""
        self._ended = False
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        fds = [theirs.fileno(), *([] if listener is None else [listener.fileno()])]
        setup = {
            "path": [entry or os.getcwd() for entry in sys.path],
            "parent_pid": os.getpid(),
            "log": str(log),
            "fds": fds,
        }
        try:
            with theirs, log.open("ab") as output, signals_held_back():
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _BOOT, json.dumps(setup)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={**os.environ, **(environment or {})},
                    pass_fds=fds,
                    start_new_session=True,  # a signal to everybody is not for those who serve
                )
        except OSError as error:
            self._link.close()
            raise LaunchError(f"{name} cannot be started on this host: {error}") from error
        order = {"target": target, "rank": None, "subject": subject, "last_act": last_act}
        with contextlib.suppress(OSError):  # it ended: poll says so
            self._link.sendall(json.dumps(order).encode() + b"\n")

    def poll(self) -> list[Report]:
        """Reports since the last call, in order; never waits."""
        while not self._ended:
            try:
                more = self._link.recv(_READ_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:
                more = b""
            if not more:
                self._ended = True
            self._received += more
        *lines, self._received = self._received.split(b"\n")
        return [json.loads(line) for line in lines]

    def failure(self, reports: Sequence[Report]) -> str | None:
        """Why it no longer serves, in a sentence, after the newest ``reports``; None = it does."""
        for report in reports:
            if report["kind"] == "error":
                if report["deliberate"]:
                    return str(report["message"])
                what = f"{report['type']}: {report['message']}"
                return f"{self._name} failed with {what} (full trace: {self._log})"
        if not self._ended:
            return None
        code = self._process.wait()
        how = RankExit(rank=0, code=code, time_s=0).signal_name or f"exit code {code}"
        return f"{self._name} ended ({how}): see {self._log}"

    def close(self, timeout_s: float) -> None:
        """Make it end, and kill it if it has not done so in time; may be called twice."""
        with contextlib.suppress(OSError):
            if self._has_last_act:
                self._link.shutdown(socket.SHUT_WR)  # as if this process were gone
            else:
                self._link.sendall(b'{"op": "stop"}\n')
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._link.close()
        self._ended = True
        with contextlib.suppress(OSError):
            if self._log.stat().st_size == 0:
                self._log.unlink()


def main(setup: dict[str, Any]) -> NoReturn:
    """The process: do what the controller orders."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    for fd in setup["fds"]:
        os.set_inheritable(fd, False)
    sys.argv = ["everstep"]
    worker_shell.run(setup["parent_pid"], setup["log"], setup["fds"])
