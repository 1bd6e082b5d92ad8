"""The process that ranks are forked from: it imports what they need once, then forks on request.

It belongs to one controller and outlives neither it nor its own children:

- it dies with the controller (parent-death signal, and end of file on its socket),
- ranks die with it (their parent-death signal is set to it),
- what ranks leave behind is adopted by it and ended with it.

The socket carries packets of JSON. Requests are

- ``{"op": "fork", "name": ..., "log": ...}``, with the process's own socket (and what else it
  needs) as file descriptors,
- ``{"op": "signal", "signal": N, "but": [name, ...]}`` for all processes but those named,
- ``{"op": "clear", "but": [name, ...]}``, which ends these and whatever they left.

It answers ``{"ready": true}`` after the imports, then ``{"forked": name, "pid": N}``, ``{"ended":
name, "code": N}`` and ``{"cleared": true}``.

Why not ``multiprocessing``'s fork server: its import phase is interrupted by Ctrl-C, its exit codes
pass through one more process, it re-imports the caller's main module in every child, and it brings
a resource tracker that can outlive a killed parent.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from everstep.cluster import host, worker_shell

BOOT = (
    "import json, sys; setup = json.loads(sys.argv[1]); sys.path[:] = setup['path']; "
    "from everstep.cluster.zygote import main; main(setup)"
)
"""Program text for ``python -c``; its argument is a JSON object with the keys of ``Setup``."""

PACKET_BYTES = 16384
_MAX_FDS = 4
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the process is started with."""

    path: list[str]
    """Entries of sys.path."""
    control_fd: int
    parent_pid: int
    preload: list[str]
    """Modules to import before the first fork."""
    inherit_fds: list[int]
    """Descriptors that this process and its ranks hold for as long as they live (locks)."""


@dataclass(frozen=True)
class Forked:
    """Seen in the child: what it was forked for."""

    parent_pid: int
    log: str
    fds: tuple[int, ...]


def main(setup: dict[str, object]) -> NoReturn:
    """Serve until the controller closes its end; in a child, run what it was forked for."""
    forked = _run(Setup(**setup))  # type: ignore[arg-type]
    if forked is not None:
        worker_shell.run(forked.parent_pid, forked.log, forked.fds)
    os._exit(0)  # taking down what was imported would take longer than all the rest


def _run(setup: Setup) -> Forked | None:
    host.die_with_parent(setup.parent_pid)
    for fd in setup.inherit_fds:
        os.set_inheritable(fd, False)
    for signum in _SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    signal.signal(worker_shell.DUMP_SIGNAL, signal.SIG_IGN)
    sys.argv = ["everstep"]
    for module in setup.preload:
        # A rank that imports it again reports what is wrong with it, in its own name.
        with contextlib.suppress(Exception):
            importlib.import_module(module)
    gc.collect()
    gc.freeze()  # so that collections in ranks do not copy pages that all of them share
    host.adopt_orphans()
    with (
        socket.socket(fileno=setup.control_fd) as control,
        _woken_by(signal.SIGCHLD, signal.SIGCONT) as wake,
    ):
        # From here on the controller's end wakes this process (even if Ctrl-Z has stopped it),
        # which then ends its descendants before itself; the kernel's SIGKILL could not.
        host.die_with_parent(setup.parent_pid, signal.SIGCONT)
        return _serve(control, wake, setup.parent_pid)


def _serve(control: socket.socket, wake: socket.socket, parent_pid: int) -> Forked | None:
    names: dict[int, str] = {}
    _send(control, {"ready": True})
    while os.getppid() == parent_pid:
        readable, _, _ = select.select([control, wake], [], [])
        if wake in readable:
            with contextlib.suppress(BlockingIOError):
                while wake.recv(4096):
                    pass
            for name, code in _reap(names):
                _send(control, {"ended": name, "code": code})
        if control in readable:
            try:
                data, fds, _, _ = socket.recv_fds(
                    control, PACKET_BYTES, _MAX_FDS, socket.MSG_CMSG_CLOEXEC
                )
            except OSError:
                break
            if not data:
                break
            request = json.loads(data)
            if request["op"] == "signal":
                for pid, name in names.items():
                    if name not in request["but"]:
                        os.kill(pid, request["signal"])
            elif request["op"] == "clear":
                host.end_descendants({pid for pid in names if names[pid] in request["but"]})
                _send(control, {"cleared": True})
            elif request["op"] == "fork":
                zygote_pid = os.getpid()
                pid = _fork()
                if pid == 0:
                    return Forked(zygote_pid, request["log"], tuple(fds))
                for fd in fds:
                    os.close(fd)
                names[pid] = request["name"]
                _send(control, {"forked": request["name"], "pid": pid})
    host.end_descendants()
    return None


def _fork() -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        # Native pools of preloaded libraries count as threads; none of them holds a Python lock.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _reap(names: dict[int, str]) -> list[tuple[str, int]]:
    """(name, exit code) of every process that ended; adopted orphans are reaped unnamed."""
    ended: list[tuple[str, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        if pid in names:
            ended.append((names.pop(pid), os.waitstatus_to_exitcode(status)))


@contextlib.contextmanager
def _woken_by(*signals: signal.Signals) -> Iterator[socket.socket]:
    """A socket that becomes readable when one of ``signals`` arrives."""
    wake, signalled = socket.socketpair()
    wake.setblocking(False)
    signalled.setblocking(False)
    with wake, signalled:
        signal.set_wakeup_fd(signalled.fileno(), warn_on_full_buffer=False)
        for signum in signals:
            signal.signal(signum, lambda *_: None)
        try:
            yield wake
        finally:
            signal.set_wakeup_fd(-1)


def _send(control: socket.socket, message: dict[str, object]) -> None:
    with contextlib.suppress(OSError):  # the controller is gone: the next read says so
        control.send(json.dumps(message).encode())
