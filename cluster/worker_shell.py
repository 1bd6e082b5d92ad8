"""What surrounds the work of a process beside the controller: its log, its link, its ending.

The work is a function named "module:function". A rank's gets a RankSpec, a helper's (the store's,
for example) gets a listening socket or plain data; all get ``report`` and ``should_stop`` and
return an exit code.
"""

import contextlib
import faulthandler
import importlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from everstep.checkpoint.errors import EverstepError
from everstep.cluster import exit_codes, host
from everstep.cluster.log_text import framed_trace
from everstep.trainer.rank_spec import RankSpec, Report

DUMP_SIGNAL = signal.SIGUSR1
"""Makes a rank write the stacks of its threads to its log."""


class Link:
    """A process's end of its connection to the controller: lines of JSON both ways.

    The controller sends what to do as the first line, and ``{"op": "stop"}`` later. Its end of
    file means that the controller is gone; then this process ends.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile("r", encoding="utf-8")
        self._sending = threading.Lock()
        self._stamp: Report = {}
        self._stop = False
        self._last_act: Callable[[], object] = lambda: None

    def receive_order(self) -> Any:
        """The first line: what to run. Later lines are listened to in the background."""
        line = self._lines.readline()
        if not line:
            os._exit(exit_codes.FAILED)
        threading.Thread(target=self._listen, name="everstep-link", daemon=True).start()
        return json.loads(line)

    def stamp(self, **facts: Any) -> None:
        """Add ``facts`` to every report."""
        self._stamp = facts

    def report(self, report: Report) -> None:
        """Send a report; never raises because the controller is gone."""
        line = json.dumps({**self._stamp, **report}, default=str)
        with self._sending, contextlib.suppress(OSError):
            self._connection.sendall(f"{line}\n".encode())

    def before_end(self, last_act: Callable[[], object]) -> None:
        """Do this before the process ends because the controller is gone."""
        self._last_act = last_act

    def should_stop(self) -> bool:
        """True once somebody asked this process to stop."""
        return self._stop

    def stop(self, *_: object) -> None:
        """Note that somebody asked to stop; a signal handler, too."""
        self._stop = True

    def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while self._lines.readline():
                self.stop()
        with contextlib.suppress(Exception):
            self._last_act()
        os._exit(exit_codes.FAILED)


def run(parent_pid: int, log: str, fds: Sequence[int]) -> NoReturn:
    """Do what the controller orders through the socket ``fds[0]``; never returns."""
    code = exit_codes.FAILED
    try:
        host.die_with_parent(parent_pid)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _redirect(log)
        link = Link(socket.socket(fileno=fds[0]))
        signal.signal(signal.SIGTERM, link.stop)
        order = link.receive_order()
        if order["rank"] is None:
            # Ranks that a signal to everybody asks to stop need their helpers to the end.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            link.stamp(rank=None)
            subject = socket.socket(fileno=fds[1]) if len(fds) > 1 else order["subject"]
            if order.get("last_act") is not None:
                last_act = find(order["last_act"])
                link.before_end(lambda: last_act(subject))
                host.outlive_parent()  # the link's end says the same, and leaves time for that
            code = work(
                order["target"], subject, link.report, link.should_stop, _trace_to_stderr, log
            )
        else:
            code = _run_rank(order, link, log)
    except BaseException:
        traceback.print_exc()
    finally:
        for flush in (sys.stdout.flush, sys.stderr.flush, logging.shutdown):
            with contextlib.suppress(Exception):
                flush()
        os._exit(code)


def work(
    target: str,
    subject: object,
    report: Callable[[Report], None],
    should_stop: Callable[[], bool],
    write_trace: Callable[[BaseException], None],
    log: str,
) -> int:
    """Run "module:function" on ``subject``; an error becomes a trace in ``log`` and a report."""
    try:
        return int(find(target)(subject, report, should_stop))
    except BaseException as error:
        with contextlib.suppress(OSError):
            write_trace(error)
        report(error_report(error, log))
        return exit_codes.FAILED


def find(target: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module, _, function = target.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def error_report(error: BaseException, log: str) -> Report:
    """The report of an error that ends a rank; ``log`` is where its trace is."""
    message = (
        f"sys.exit({error.code!r}) was called" if isinstance(error, SystemExit) else str(error)
    )
    return {
        "kind": "error",
        "type": type(error).__name__,
        "message": message,
        "deliberate": isinstance(error, EverstepError),
        "traceback_file": log,
        "time": time.time(),
    }


def rank_environment(spec: RankSpec) -> Mapping[str, str]:
    """Variables that tell libraries which rank this is, as torchrun sets them."""
    return {
        "RANK": str(spec.rank),
        "WORLD_SIZE": str(spec.world_size),
        "LOCAL_RANK": str(spec.local_rank),
        "LOCAL_WORLD_SIZE": str(spec.local_world_size),
    }


def _run_rank(order: Mapping[str, Any], link: Link, log: str) -> int:
    spec = RankSpec(**order["spec"])
    host.prefer_for_oom_kill()
    faulthandler.enable()
    faulthandler.register(DUMP_SIGNAL, all_threads=True)
    os.environ.update(rank_environment(spec))
    link.stamp(rank=spec.rank)
    link.report({"kind": "started", "pid": os.getpid(), "host": socket.gethostname()})
    return work(order["target"], spec, link.report, link.should_stop, _trace_to_stderr, log)


def _trace_to_stderr(error: BaseException) -> None:
    sys.stderr.write(framed_trace(error))
    sys.stderr.flush()


def _redirect(log: str) -> None:
    """Standard output and error of this process go to the end of its log."""
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    for fd in (1, 2):
        os.dup2(target, fd)
    os.close(target)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)
