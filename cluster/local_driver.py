"""The driver for ranks as processes of this host, forked from one process that is warm already.

See ``zygote.py`` for who dies with whom.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from everstep.cluster import host, rendezvous, zygote
from everstep.cluster.driver import (
    Broken,
    DriverEvent,
    Placement,
    RankExit,
    Reported,
    Seat,
    Waiting,
    wait_silently,
)
from everstep.cluster.errors import LaunchError
from everstep.cluster.keepers import KeepFor, end_keepers
from everstep.cluster.stop_signals import signals_held_back
from everstep.cluster.worker_shell import DUMP_SIGNAL
from everstep.trainer.rank_spec import RankSpec

DEFAULT_TARGET = "everstep.trainer.worker_main:run_rank"
DEFAULT_PRELOAD = ("everstep.trainer.worker_main",)
START_LOG_NAME = "start.log"
_STORE = "store"
_STORE_TARGET = "everstep.cluster.rendezvous:serve"
_CLOSE_LIMIT_S = 5.0
_CLEAR_LIMIT_S = 20.0
_SHORT_WAIT_S = 1.0
_WAIT_S = 0.05
_READ_BYTES = 1 << 16


def _no_keeper(job: str) -> None:
    raise LaunchError(f"a rank was told of keeper {job}, and nothing here starts keepers")


@dataclass
class _Process:
    """The store (``rank`` is None) or a rank, from the request to fork it until its end."""

    rank: int | None
    link: socket.socket
    order: dict[str, Any]
    pid: int | None = None
    received: bytes = b""


class LocalDriver:
    """Runs ranks as processes of this host; a ClusterDriver.

    Args:
        logs: folder of the ranks' logs; it exists.
        target: "module:function" that a rank runs, see ``trainer/rank_spec.py``.
        preload: modules that are imported once, before ranks are forked.
        store_port: port of the rendezvous store; 0 = any free one, None = ranks need no store.
        threads: CPU threads per rank, or 'auto'.
        inherit_fds: descriptors that stay open as long as any process of this driver lives.
        interface: network interface that gloo uses; None = gloo chooses.
        keep: starts the keepers that specs name, where they do not run yet.
        start_log: file in ``logs`` for what is written before there are ranks.
    """

    def __init__(
        self,
        logs: Path,
        *,
        target: str = DEFAULT_TARGET,
        preload: Sequence[str] = DEFAULT_PRELOAD,
        store_port: int | None = 0,
        threads: int | str = "auto",
        inherit_fds: Sequence[int] = (),
        interface: str | None = host.loopback_interface(),
        keep: KeepFor = _no_keeper,
        start_log: str = START_LOG_NAME,
    ) -> None:
        self._logs = logs
        self._target = target
        self._preload = list(preload)
        self._store_port = store_port
        self._threads = threads
        self._inherit_fds = list(inherit_fds)
        self._interface = interface
        self._start_log = start_log
        self._keep = keep
        self._keepers: list[str] = []
        self._selector = selectors.DefaultSelector()
        self._zygote: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._ready = False
        self._processes: dict[str, _Process] = {}
        self._ending = False
        self._stop_asked = False
        self._placement: Placement | None = None
        self._cleared = False
        self._late: list[DriverEvent] = []

    @property
    def start_log(self) -> Path:
        """What is written while modules are imported, before there are ranks."""
        return self._logs / self._start_log

    def place(self, world_size: int, waiting: Waiting = wait_silently) -> Placement:
        """All ranks on this host. Raises PortTakenError."""
        listener = None if self._store_port is None else rendezvous.listen(self._store_port)
        try:
            self._start_zygote(world_size)
            store = None
            if listener is not None:
                name, port = listener.getsockname()
                store = f"{name}:{port}"
                order = {"target": _STORE_TARGET, "rank": None}
                self._fork(_STORE, None, order, self.start_log, [listener.fileno()])
        finally:
            if listener is not None:
                listener.close()
        hostname = socket.gethostname()
        seats = [
            Seat(host=hostname, local_rank=rank, local_world_size=world_size)
            for rank in range(world_size)
        ]
        self._placement = Placement(seats=tuple(seats), store=store)
        return self._placement

    def start(self, specs: Sequence[RankSpec]) -> None:
        """Fork all ranks as soon as the imports are done, and keepers run. Raises KeeperError."""
        self._keepers = sorted({spec.keeper for spec in specs if spec.keeper is not None})
        for job in self._keepers:
            self._keep(job)
        for spec in specs:
            order = {"target": self._target, "rank": spec.rank, "spec": asdict(spec)}
            log = rank_log(self._logs, spec.rank)
            self._fork(f"rank {spec.rank}", spec.rank, order, log, [])

    def renew(self, waiting: Waiting = wait_silently) -> Placement:
        """End what the ranks left; the store and the process that forks ranks stay."""
        self._ending = self._stop_asked = self._cleared = False
        self._ask_zygote({"op": "clear", "but": [_STORE]})
        began_s = time.monotonic()
        while not self._cleared:
            waited_s = time.monotonic() - began_s
            if waited_s > _SHORT_WAIT_S:
                waiting("ending what the ranks have left")
            if waited_s > _CLEAR_LIMIT_S:
                raise LaunchError(
                    f"what the ranks have started did not end within {_CLEAR_LIMIT_S:g} seconds "
                    "(waiting for a device?): end it, and start this command again"
                )
            if self._control is None or self._placement is None:
                raise LaunchError(f"the process that starts ranks ended: see {self.start_log}")
            self._late += self._select(_WAIT_S)
        assert self._placement is not None
        return self._placement

    def poll(self, timeout_s: float) -> list[DriverEvent]:
        """Reports and exits since the last call."""
        late, self._late = self._late, []
        return late + self._select(0 if late else timeout_s)

    def end_keepers(self, timeout_s: float) -> list[str]:
        """End those that ranks were told of."""
        keepers, self._keepers = self._keepers, []
        return end_keepers(keepers, timeout_s)

    def ask_stop(self) -> None:
        """Tell every rank, also those that are not there yet."""
        self._stop_asked = True
        for process in self._processes.values():
            if process.rank is not None and process.pid is not None:
                _send_line(process.link, {"op": "stop"})

    def dump_stacks(self) -> None:
        """Stacks of all threads of all ranks go to their logs."""
        self._signal(DUMP_SIGNAL)

    def kill(self) -> None:
        """SIGKILL to every rank."""
        self._ending = True
        if self._ready:
            self._signal(signal.SIGKILL)
        elif self._zygote is not None:
            self._zygote.kill()  # it is still importing, and has no children

    def close(self) -> None:
        """End the ranks, what they started, and the process they were forked from."""
        self._ending = True
        if self._control is not None:
            self._selector.unregister(self._control)
            self._control.close()
            self._control = None
        if self._zygote is not None:
            if not self._ready:
                self._zygote.kill()
            try:
                self._zygote.wait(_CLOSE_LIMIT_S)
            except subprocess.TimeoutExpired:
                self._zygote.kill()
                self._zygote.wait()
            _wait_gone([p.pid for p in self._processes.values() if p.pid is not None])
            self._zygote = None
        for name in list(self._processes):
            self._forget(name)
        self._selector.close()
        with contextlib.suppress(OSError):
            if self.start_log.stat().st_size == 0:
                self.start_log.unlink()

    def _select(self, timeout_s: float) -> list[DriverEvent]:
        events: list[DriverEvent] = []
        for key, _ in self._selector.select(timeout_s):
            if key.data is None:
                events += self._hear_zygote()
            elif key.data in self._processes:
                events += self._hear(key.data)
        return events

    def _start_zygote(self, world_size: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        setup = zygote.Setup(
            path=[entry or os.getcwd() for entry in sys.path],
            control_fd=theirs.fileno(),
            parent_pid=os.getpid(),
            preload=self._preload,
            inherit_fds=self._inherit_fds,
        )
        try:
            with theirs, self.start_log.open("ab") as log, signals_held_back():
                self._zygote = subprocess.Popen(
                    [sys.executable, "-P", "-c", zygote.BOOT, json.dumps(asdict(setup))],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._environment(world_size),
                    pass_fds=[theirs.fileno(), *self._inherit_fds],
                )
        except OSError as error:
            ours.close()
            raise LaunchError(f"no process can be started on this host: {error}") from error
        self._control = ours
        self._selector.register(ours, selectors.EVENT_READ, None)

    def _environment(self, world_size: int) -> dict[str, str]:
        threads = host.threads_per_rank(self._threads, host.available_cores(), world_size)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if self._interface is not None:
            # gloo would look up the host's name otherwise, which need not resolve.
            environment.setdefault("GLOO_SOCKET_IFNAME", self._interface)
        return environment

    def _fork(
        self, name: str, rank: int | None, order: dict[str, Any], log: Path, fds: list[int]
    ) -> None:
        if self._control is None:
            raise LaunchError("ranks can be started only after they were placed, and once")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        request = {"op": "fork", "name": name, "log": str(log)}
        with theirs:
            message = json.dumps(request).encode()
            with contextlib.suppress(OSError):  # it died: poll notices its end of file
                socket.send_fds(self._control, [message], [theirs.fileno(), *fds])
        self._processes[name] = _Process(rank, ours, order)
        self._selector.register(ours, selectors.EVENT_READ, name)

    def _signal(self, signum: signal.Signals) -> None:
        self._ask_zygote({"op": "signal", "signal": signum, "but": [_STORE]})

    def _ask_zygote(self, request: Mapping[str, object]) -> None:
        if self._control is not None:
            with contextlib.suppress(OSError):
                self._control.send(json.dumps(request).encode())

    def _hear_zygote(self) -> list[DriverEvent]:
        assert self._control is not None
        try:
            data = self._control.recv(zygote.PACKET_BYTES)
        except OSError:
            data = b""
        if not data:
            return self._zygote_gone()
        message = json.loads(data)
        if "ready" in message:
            self._ready = True
        elif "cleared" in message:
            self._cleared = True
        elif "forked" in message:
            process = self._processes[message["forked"]]
            process.pid = message["pid"]
            _send_line(process.link, process.order)
            if self._stop_asked and process.rank is not None:
                _send_line(process.link, {"op": "stop"})
        elif "ended" in message:
            return self._ended(message["ended"], message["code"])
        return []

    def _zygote_gone(self) -> list[DriverEvent]:
        """Its children are dying with it; no exit of theirs is told by anybody."""
        assert self._control is not None
        assert self._zygote is not None
        self._selector.unregister(self._control)
        self._control.close()
        self._control = None
        code = self._zygote.wait()
        _wait_gone([p.pid for p in self._processes.values() if p.pid is not None])
        events: list[DriverEvent] = []
        if not self._ending:
            ended = RankExit(rank=0, code=code, time_s=time.time())
            how = ended.signal_name or f"exit code {code}"
            events.append(
                Broken(f"the process that starts ranks ended ({how}): see {self.start_log}")
            )
        for name in list(self._processes):
            events += self._ended(name, -signal.SIGKILL)
        return events

    def _ended(self, name: str, code: int) -> list[DriverEvent]:
        events = self._hear(name)
        process = self._forget(name)
        if process.rank is not None:
            return [*events, RankExit(rank=process.rank, code=code, time_s=time.time())]
        if self._ending:
            return events
        how = RankExit(rank=0, code=code, time_s=0).signal_name or f"exit code {code}"
        return [*events, Broken(f"the rendezvous store ended ({how}): see {self.start_log}")]

    def _hear(self, name: str) -> list[DriverEvent]:
        """Reports that a process has sent and that were not read yet."""
        process = self._processes[name]
        data = process.received
        while True:
            try:
                more = process.link.recv(_READ_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:
                more = b""
            if not more:
                with contextlib.suppress(KeyError):
                    self._selector.unregister(process.link)
                break
            data += more
        *lines, process.received = data.split(b"\n")
        reports = [json.loads(line) for line in lines]
        if process.rank is not None:
            return [Reported(process.rank, report) for report in reports]
        return [
            Broken(f"the rendezvous store failed with {report['type']}: {report['message']}")
            for report in reports
            if report["kind"] == "error"
        ]

    def _forget(self, name: str) -> _Process:
        process = self._processes.pop(name)
        with contextlib.suppress(KeyError):
            self._selector.unregister(process.link)
        process.link.close()
        return process


def rank_log(logs: Path, rank: int) -> Path:
    """The log of a rank in the folder of logs."""
    return logs / f"rank-{rank:05d}.log"


def _send_line(link: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # it ended: its exit comes through the zygote
        link.sendall(json.dumps(message).encode() + b"\n")


def _wait_gone(pids: Sequence[int]) -> None:
    """Wait until processes that are not our children are gone, or a deadline has passed."""
    deadline_s = time.monotonic() + _CLOSE_LIMIT_S
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline_s:
        time.sleep(0.01)


def _alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
