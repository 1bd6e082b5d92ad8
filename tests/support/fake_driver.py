"""A driver whose ranks are threads of this process: the reference for the driver's contract."""

import queue
import signal
import threading
import time
from collections.abc import Sequence

from everstep.cluster.driver import (
    DriverEvent,
    Placement,
    RankExit,
    Reported,
    Seat,
    Waiting,
    wait_silently,
)
from everstep.cluster.worker_shell import work
from everstep.trainer.rank_spec import RankSpec, Report


class _Killed(BaseException):
    """Unwinds the thread of a rank that was killed."""


class InMemoryDriver:
    """Runs "module:function" in a thread per rank; kills take effect at the rank's next call."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._events: queue.Queue[DriverEvent] = queue.Queue()
        self._threads: list[threading.Thread] = []
        self._stop = threading.Event()
        self._killed = threading.Event()
        self.calls: list[str] = []
        self.specs: list[RankSpec] = []
        self.ended_keepers = False

    def place(self, world_size: int, waiting: Waiting = wait_silently) -> Placement:
        seat_of = [
            Seat(host="memory", local_rank=rank, local_world_size=world_size)
            for rank in range(world_size)
        ]
        return Placement(seats=tuple(seat_of), store="memory:0")

    def start(self, specs: Sequence[RankSpec]) -> None:
        self.specs += specs
        for spec in specs:
            thread = threading.Thread(
                target=self._run, args=(spec,), name=f"rank {spec.rank}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def renew(self, waiting: Waiting = wait_silently) -> Placement:
        ended, self._threads = self._threads, []
        for thread in ended:
            thread.join(5)
        self._stop.clear()
        self._killed.clear()
        self.calls.append("renew")
        return self.place(len(ended))

    def poll(self, timeout_s: float) -> list[DriverEvent]:
        events = []
        try:
            events.append(self._events.get(timeout=timeout_s))
            while True:
                events.append(self._events.get_nowait())
        except queue.Empty:
            return events

    def end_keepers(self, timeout_s: float) -> list[str]:
        self.ended_keepers = True
        return []

    def ask_stop(self) -> None:
        self.calls.append("ask_stop")
        self._stop.set()

    def dump_stacks(self) -> None:
        self.calls.append("dump_stacks")

    def kill(self) -> None:
        self.calls.append("kill")
        self._killed.set()

    def close(self) -> None:
        self._killed.set()
        for thread in self._threads:
            thread.join(5)

    def tell(self, event: DriverEvent) -> None:
        """Make the next poll return an event."""
        self._events.put(event)

    def _run(self, spec: RankSpec) -> None:
        def report(report: Report) -> None:
            self._check()
            if report["kind"] == "dies":
                raise _Killed
            self._events.put(Reported(spec.rank, {"rank": spec.rank, **report}))

        def should_stop() -> bool:
            self._check()
            return self._stop.is_set()

        code = -signal.SIGKILL
        try:
            report({"kind": "started", "pid": 0, "host": "memory"})
            code = work(self._target, spec, report, should_stop, _no_trace, "memory.log")
        except _Killed:
            code = -signal.SIGKILL
        self._events.put(RankExit(rank=spec.rank, code=code, time_s=time.time()))

    def _check(self) -> None:
        if self._killed.is_set():
            raise _Killed


def _no_trace(error: BaseException) -> None:
    if isinstance(error, _Killed):
        raise error


def specs_for(placement: Placement, run_dir: str = "nowhere") -> list[RankSpec]:
    """Specs of a run that needs no configuration."""
    return [
        RankSpec(
            config_yaml="",
            run_dir=run_dir,
            rank=rank,
            world_size=len(placement.seats),
            local_rank=seat.local_rank,
            local_world_size=seat.local_world_size,
            attempt=0,
            resume="auto",
            store=placement.store,
        )
        for rank, seat in enumerate(placement.seats)
    ]
