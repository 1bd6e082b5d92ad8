"""One thread beside the training, which does what it is given, in order."""

import queue
import threading
from collections.abc import Callable


class Beside:
    """Runs tasks one after the other in a daemon thread, which starts with the first of them.

    Tasks must not raise. A daemon, since a task may hang with a rank that is lost, and the process
    has to end then.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def do(self, task: Callable[[], None]) -> None:
        """Run a task after those that were given before."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        self._tasks.put(task)

    def close(self, timeout_s: float) -> None:
        """Wait until everything is done that was given, or for a time; may be called twice."""
        if self._thread is not None:
            self._tasks.put(None)
            self._thread.join(timeout_s)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
