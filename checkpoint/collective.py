"""How ranks agree: one operation, exchange.

Implementations: a single process here, a process group of torch in ``torch_collective.py``.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, cast

from everstep.checkpoint.errors import CheckpointError, EverstepError

T = TypeVar("T")


class Collective(Protocol):
    """All ranks call ``exchange`` in the same order."""

    @property
    def rank(self) -> int:
        """Number of this rank, from 0."""
        ...

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        ...

    def exchange(self, tag: str, payload: bytes) -> list[bytes]:
        """Give every rank the payload of every rank, in order of rank.

        Raises:
            CollectiveError: a rank is gone, too late, or exchanges under another tag.
        """
        ...


class SingleProcess:
    """The collective of a job with one rank."""

    rank = 0
    world_size = 1

    def exchange(self, tag: str, payload: bytes) -> list[bytes]:
        """The own payload, alone."""
        return [payload]


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """How an action went on all ranks."""

    result: T | None
    """The own result; None where the own action failed."""
    error: Exception | None
    """The own error."""
    causes: dict[int, str]
    """For each rank that failed, why: the same on all ranks, empty when all succeeded."""


def agree(collective: Collective, tag: str, action: Callable[[], T]) -> Outcome[T]:
    """Run an action on every rank and tell every rank how it went on all of them.

    Only ``Exception`` is turned into a cause; what means "stop now" passes through.
    """
    result: T | None = None
    error: Exception | None = None
    try:
        result = action()
    except Exception as e:
        error = e
    replies = collective.exchange(tag, describe(error).encode() if error else b"")
    return Outcome(result, error, {r: text.decode() for r, text in enumerate(replies) if text})


def on_rank0(collective: Collective, tag: str, action: Callable[[], T]) -> T:
    """Run an action on rank 0 and give its JSON-able result to all ranks.

    Raises:
        CheckpointError: it failed; on rank 0 its own error.
    """
    payload = b""
    error: Exception | None = None
    if collective.rank == 0:
        try:
            payload = json.dumps({"result": action()}).encode()
        except Exception as e:
            error = e
            payload = json.dumps({"error": describe(e)}).encode()
    reply = json.loads(collective.exchange(tag, payload)[0])
    if error is not None:
        raise error
    if "error" in reply:
        raise CheckpointError(reply["error"])
    return cast(T, reply["result"])


def describe(error: Exception) -> str:
    """One line about an error, for people; never empty."""
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}"
    text = " ".join(str(error).split())
    deliberate = isinstance(error, EverstepError) and text
    return text if deliberate else f"{type(error).__name__}: {text}"
