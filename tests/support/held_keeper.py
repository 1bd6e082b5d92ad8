"""The processes of a keeper that stops where files say: ``python -m`` runs this.

While there is a file ``HOLDS/POINT``, every flush waits when it comes to that point, and says so
with a file ``HOLDS/at POINT RANK``.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.keeper.main import main
from everstep.checkpoint.snapshots import flush
from everstep.checkpoint.snapshots.memory import Flushed, FlushOrder

PROGRAM = "tests.support.held_keeper"
VARIABLE = "EVERSTEP_TEST_HOLDS"
HOLD_POINTS = ("ordered", "writing", "written", "voted", "committing", "committed")
"""In the order in which a flush comes to them; the last two only those of rank 0."""


def _wait(point: str, rank: int) -> None:
    holds = Path(os.environ[VARIABLE])
    if (holds / point).exists():
        (holds / f"at {point} {rank}").touch()
        while (holds / point).exists():
            time.sleep(0.005)


def _held_flush(
    slot: ByteArray,
    order: FlushOrder,
    *,
    on_bytes: Callable[[int], None] | None = None,
    cancelled: Callable[[], bool] = flush.never,
) -> Flushed:
    def wrote(n_bytes: int) -> None:
        if on_bytes is not None:
            on_bytes(n_bytes)
        _wait("writing", order.rank)

    _wait("ordered", order.rank)
    return flush.flush_slot(slot, order, on_bytes=wrote, cancelled=cancelled)


def _install() -> None:
    put_vote, publish_step = CheckpointDirectory.put_vote, flush.publish_step

    def held_vote(self: Any, step_id: Any, rank: int, part: bytes) -> None:
        _wait("written", rank)
        put_vote(self, step_id, rank, part)
        _wait("voted", rank)

    def held_publish(*args: Any) -> Any:
        _wait("committing", 0)
        done = publish_step(*args)
        _wait("committed", 0)
        return done

    CheckpointDirectory.put_vote = held_vote  # type: ignore[method-assign]
    flush.publish_step = held_publish


if __name__ == "__main__":
    _install()
    sys.exit(main(sys.argv[1:], module=PROGRAM, flush=_held_flush))
