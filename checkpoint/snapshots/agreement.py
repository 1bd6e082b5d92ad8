"""Ranks exchange tickets, beside the training where there is time for it (see ``tickets.py``)."""

import struct
import threading
from collections.abc import Callable
from concurrent.futures import Future

from everstep.checkpoint.collective import Collective
from everstep.checkpoint.snapshots.beside import Beside
from everstep.checkpoint.snapshots.tickets import (
    TICKET_NUMBERS,
    Decision,
    Ticket,
    decide,
    encode,
)

_NUMBERS = struct.Struct(f"<{TICKET_NUMBERS}q")


class Agreement:
    """One decision of all ranks per save.

    An all-gather stands for the all-reduce of ``tickets``: each rank computes the minimum itself.

    Args:
        collective: the ranks; used by the thread beside the training from ``post`` to ``decide``.
        beside: this thread.
        ticket: this rank's ticket for a step, as things are.
        durable_every: steps between durable snapshots.
        timeout_s: how long a decision is waited for.
    """

    def __init__(
        self,
        collective: Collective,
        beside: Beside,
        ticket: Callable[[int], Ticket],
        *,
        durable_every: int | None,
        timeout_s: float,
    ) -> None:
        self._collective, self._beside, self._ticket = collective, beside, ticket
        self._durable_every, self._timeout_s = durable_every, timeout_s
        self._lock = threading.Lock()
        self._posted: tuple[int, Future[Decision]] | None = None
        self._last_step: int | None = None
        self._stride = 1

    def post(self) -> None:
        """Begin to exchange tickets for the next save, unless that has been done."""
        future: Future[Decision] = Future()
        with self._lock:  # hooks of optimizers inside of backward run on other threads
            if self._posted is not None or self._last_step is None:
                return
            step = self._last_step + self._stride
            self._posted = step, future

        def exchange() -> None:
            try:
                future.set_result(self._exchange(step))
            except Exception as e:
                future.set_exception(e)

        self._beside.do(exchange)

    def settle(self) -> None:
        """Return when the collective is the caller's again; a posted ticket counts no more.

        Raises:
            CollectiveError: a rank is gone, or too late.
        """
        self._taken(None)

    def decide(self, step: int, *, fresh: bool = False) -> Decision:
        """What all ranks do with a save; they ask for the same steps in the same order.

        Args:
            step: of the save.
            fresh: exchange tickets now, whatever was posted.

        Raises:
            CollectiveError: a rank is gone, or too late.
        """
        decision = self._taken(step)
        if decision is None or fresh:
            decision = self._exchange(step)
        if self._last_step is not None and step > self._last_step:
            self._stride = step - self._last_step
        self._last_step = step
        return decision

    def _taken(self, step: int | None) -> Decision | None:
        with self._lock:
            posted, self._posted = self._posted, None
        if posted is None:
            return None
        decision = posted[1].result(self._timeout_s)
        return decision if posted[0] == step else None

    def _exchange(self, step: int) -> Decision:
        mine = self._ticket(step)
        replies = self._collective.exchange("ticket", _NUMBERS.pack(*encode(mine)))
        rows = [_NUMBERS.unpack(reply) for reply in replies]
        reduced = [min(column) for column in zip(*rows, strict=True)]
        return decide(reduced, mine, durable_every=self._durable_every)
