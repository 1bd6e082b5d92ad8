"""Following a job to its end: its output as it comes, over connections that may break."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

from everstep.cluster.job_errors import ConnectionLostError
from everstep.cluster.job_record import PENDING, JobLog, JobRecord, JobServer

POLL_S = 1.0
NO_STREAM_S = 5.0
"""Pause between looks at the whole log, where it cannot be had as a stream."""
RECONNECT_S = 60.0
"""How long a connection that broke is tried again, from the last answer on."""
IDLE_S = 120.0
"""A connection that brought nothing for this long is made anew: it may be dead."""
WAITING_AFTER_S = 5.0
"""A job that has not started by then gets a line that says so."""

Show = Callable[[str], None]
Sleep = Callable[[float], Awaitable[None]]


class Follower:
    """Follows one job.

    Args:
        show: prints a line of the job.
        notice: prints a line about following it.
        seen_chars: beginning of the log that is not to be shown.
    """

    def __init__(
        self,
        server: JobServer,
        job_id: str,
        *,
        show: Show,
        notice: Show,
        seen_chars: int = 0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Sleep = asyncio.sleep,
        idle_s: float = IDLE_S,
    ) -> None:
        self._server = server
        self._job_id = job_id
        self._show = show
        self._notice = notice
        self._log = JobLog(seen_chars)
        self._clock = clock
        self._sleep = sleep
        self._idle_s = idle_s
        self._answered_at_s = clock()
        self._lost = False

    @property
    def told_exit_code(self) -> int | None:
        """The exit code that the log tells; None where it tells none."""
        return self._log.exit_code

    def follow(self, deadline_s: float | None = None) -> JobRecord | None:
        """The job once it has ended; None when ``deadline_s`` seconds were over before.

        Raises:
            ConnectionLostError: the cluster has not answered for ``RECONNECT_S``.
            UnknownJobError: it does not know the job.
            KeyboardInterrupt: Ctrl-C; the job goes on.
        """
        return asyncio.run(self._within(deadline_s))

    async def _within(self, deadline_s: float | None) -> JobRecord | None:
        try:
            async with asyncio.timeout(deadline_s):
                return await self._follow()
        except TimeoutError:
            return None

    async def _follow(self) -> JobRecord:
        record = await self._wait_for_start()
        while not record.ended:
            pause_s = POLL_S
            try:
                if not await self._streamed():
                    pause_s = NO_STREAM_S
                    self._show_log()
                record = self._get()
            except ConnectionLostError as error:
                self._bear(error)
            if not record.ended:
                await self._sleep(pause_s)
        with contextlib.suppress(ConnectionLostError):  # how the job ended is known
            self._show_log()
        for line in self._log.finish():
            self._show(line)
        return record

    async def _wait_for_start(self) -> JobRecord:
        begin_s, told = self._clock(), False
        while True:
            try:
                record = self._get()
            except ConnectionLostError as error:
                self._bear(error)
            else:
                if record.status != PENDING:
                    return record
                if not told and self._clock() - begin_s >= WAITING_AFTER_S:
                    told = True
                    self._notice(
                        "waiting for the cluster to start the job (it may be setting up the "
                        "runtime env, or wait for resources)"
                    )
            await self._sleep(POLL_S)

    def _get(self) -> JobRecord:
        record = self._server.get(self._job_id)
        self._answered()
        return record

    async def _streamed(self) -> bool:
        """Show output until the stream ends or brings nothing for long; False when it broke."""
        self._log.rewind()
        stream = self._server.tail(self._job_id)
        try:
            async with contextlib.aclosing(_pieces(stream, self._idle_s)) as pieces:
                async for piece in pieces:
                    self._answered()
                    for line in self._log.feed(piece):
                        self._show(line)
        except ConnectionLostError:
            return False
        return True

    def _show_log(self) -> None:
        """Show what the log has by now; gateways let this through where they let no stream."""
        self._log.rewind()
        for line in self._log.feed(self._server.log(self._job_id)):
            self._show(line)

    def _answered(self) -> None:
        self._answered_at_s = self._clock()
        if self._lost:
            self._lost = False
            self._notice("connected again")

    def _bear(self, error: ConnectionLostError) -> None:
        if self._clock() - self._answered_at_s >= RECONNECT_S:
            raise error
        if not self._lost:
            self._lost = True
            self._notice(f"connection lost ({error.why}); trying again for {RECONNECT_S:g} s")


async def _pieces(stream: AsyncIterator[str], idle_s: float) -> AsyncGenerator[str, None]:
    """The pieces of a stream until it ends, or ``idle_s`` have passed without one."""
    iterator = aiter(stream)
    try:
        while True:
            async with asyncio.timeout(idle_s):
                piece = await anext(iterator)
            yield piece
    except (StopAsyncIteration, TimeoutError):
        return
    finally:
        close = getattr(stream, "aclose", None)
        if close is not None:
            await close()
