"""What an actor of Ray does for one rank: it keeps the rank's processes and carries messages.

The rank itself is a process beside the actor, started as the local driver starts it
(``local_driver.py``): the same log, environment, signals and exit codes, and what the rank leaves
behind is ended with it. The actor never imports torch, so its control methods answer whatever the
rank does; when the actor is gone, however that came about, the rank's processes end.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from everstep.checkpoint.errors import EverstepError
from everstep.cluster import exit_codes, host
from everstep.cluster.driver import Broken, DriverEvent, RankExit, Reported
from everstep.cluster.errors import LaunchError
from everstep.cluster.keepers import KeeperOptions, end_keepers
from everstep.cluster.local_driver import START_LOG_NAME, LocalDriver, rank_log
from everstep.cluster.log_text import framed_trace
from everstep.cluster.ray_plan import version_difference
from everstep.cluster.shared_dir import check_token, hold_for_rank
from everstep.cluster.worker_shell import error_report
from everstep.trainer.rank_spec import RankSpec

_POLL_S = 0.1
_BATCH_BYTES = 64 * 1024
"""Reports are handed over in batches of about this size: small ones travel fastest in Ray."""


@dataclass(frozen=True, kw_only=True)
class HostSetup:
    """How an actor starts its rank; plain data, so that it can be sent as JSON."""

    cwd: str
    """Working directory of the command; taken where this node has it, too."""
    token: str | None
    """What the run directory's token must be; None = it is not checked (tests)."""
    node: str
    """This node, for a person."""
    address: str
    """IP address of this node."""
    one_host: bool
    """All ranks share one host."""
    versions: Mapping[str, str]
    """Versions of the libraries of the command."""
    target: str
    preload: Sequence[str]
    threads: int | str
    keepers: Mapping[str, Any]
    """Fields of ``KeeperOptions``."""
    silence_s: float
    """The rank ends when its controller has not asked for its reports for so long."""


class RankHost:
    """Keeps one rank; its methods are called from several threads.

    Args:
        setup: fields of ``HostSetup``.
        spec: fields of ``RankSpec``.
    """

    def __init__(self, setup: Mapping[str, Any], spec: Mapping[str, Any]) -> None:
        self._setup = HostSetup(**setup)
        self._spec = RankSpec(**spec)
        self._asked: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._news = threading.Condition()
        self._messages: list[str] = []
        self._taken = 0
        self._heard_s = time.monotonic()
        self._parent_pid = os.getppid()

    def run(self) -> None:
        """Run the rank to its end; the last message tells how it ended."""
        try:
            self._prepare()
            self._run()
        except BaseException as error:
            log = rank_log(self._logs, self._spec.rank)
            if not isinstance(error, EverstepError):
                with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:
                    file.write(framed_trace(error))
            report = {"rank": self._spec.rank, **error_report(error, str(log))}
            self._put(Reported(self._spec.rank, report))
            self._put(RankExit(rank=self._spec.rank, code=exit_codes.FAILED, time_s=time.time()))

    def take(self, seen: int, wait_s: float) -> list[str]:
        """Messages after the first ``seen`` ones, as JSON; waits for at least one.

        Every message is one of ``{"report": ...}``, ``{"broken": why}`` and, as the last one,
        ``{"exit": code, "time": ...}``. Empty when there was none within ``wait_s``.
        """
        with self._news:
            self._heard_s = time.monotonic()
            del self._messages[: seen - self._taken]
            self._taken = seen
            self._news.wait_for(lambda: self._messages, wait_s)
            size_bytes = 0
            batch: list[str] = []
            for message in self._messages:
                if batch and size_bytes + len(message) > _BATCH_BYTES:
                    break
                size_bytes += len(message)
                batch.append(message)
            self._heard_s = time.monotonic()
            return batch

    def ask(self, what: str) -> None:
        """'stop' after the step, 'dump' the stacks into the log, or 'end' at once."""
        if what == "end":
            os._exit(exit_codes.FAILED)  # the rank's processes end with this one
        self._asked.put(what)

    def end_keeper(self, job: str, timeout_s: float) -> list[str]:
        """End a keeper of this node; what went wrong, if it did."""
        return end_keepers([job], timeout_s)

    @property
    def _logs(self) -> Path:
        return Path(self._spec.run_dir) / "logs"

    def _prepare(self) -> None:
        setup = self._setup
        if setup.token is not None:
            check_token(Path(self._spec.run_dir), setup.token, setup.node)
        wrong = version_difference(setup.versions, installed_versions(), setup.node)
        if wrong is not None:
            raise LaunchError(wrong)
        if os.path.isdir(setup.cwd):
            os.chdir(setup.cwd)

    def _run(self) -> None:
        setup, spec = self._setup, self._spec
        held = None if setup.token is None else hold_for_rank(Path(spec.run_dir))
        interface = host.interface_of(setup.address)
        driver = LocalDriver(
            self._logs,
            target=setup.target,
            preload=setup.preload,
            store_port=None,
            threads=setup.threads,
            inherit_fds=[] if held is None else [held],
            interface=host.loopback_interface() if setup.one_host else interface,
            keep=self._keeper_options(interface).keep,
            start_log=start_log_name(spec.rank),
        )
        try:
            driver.place(spec.local_world_size)
            driver.start([spec])
            ended = self._serve(driver)
        finally:
            driver.close()
            if held is not None:
                os.close(held)
        self._put(ended)

    def _keeper_options(self, interface: str | None) -> KeeperOptions:
        """With the node's own interface for the data plane, where ranks are on several hosts."""
        options = KeeperOptions(**self._setup.keepers)
        if options.interface is None and not self._setup.one_host:
            return replace(options, interface=interface)
        return options

    def _serve(self, driver: LocalDriver) -> RankExit:
        while True:
            self._do_what_was_asked(driver)
            for event in driver.poll(_POLL_S):
                if isinstance(event, RankExit):
                    return event
                self._put(event)
            if os.getppid() != self._parent_pid or self._silent_s() > self._setup.silence_s:
                driver.close()  # its node died, or its controller is gone
                os._exit(exit_codes.FAILED)

    def _do_what_was_asked(self, driver: LocalDriver) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                if self._asked.get_nowait() == "stop":
                    driver.ask_stop()
                else:
                    driver.dump_stacks()

    def _silent_s(self) -> float:
        with self._news:
            return time.monotonic() - self._heard_s

    def _put(self, event: DriverEvent) -> None:
        match event:
            case Reported(report=report):
                message = json.dumps({"report": report})
            case Broken(why):
                message = json.dumps({"broken": f"{why} (node {self._setup.node})"})
            case RankExit(code=code, time_s=time_s):
                message = json.dumps({"exit": code, "time": time_s})
        with self._news:
            self._messages.append(message)
            self._news.notify_all()


def installed_versions() -> dict[str, str]:
    """Versions of what has to be the same on all nodes; '' for what is missing."""
    versions = {"Python": platform.python_version()}
    for library in ("ray", "torch"):
        try:
            # Builds of one version ('+cpu', '+cu130') work together.
            versions[library] = importlib.metadata.version(library).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            versions[library] = ""
    from everstep import __version__

    versions["everstep"] = __version__
    return versions


def start_log_name(rank: int) -> str:
    """Log of what a rank's processes write before it begins; that of rank 0 is shown."""
    return START_LOG_NAME if rank == 0 else f"start-{rank:05d}.log"
