"""How ranks agree: one operation, exchange.

Implementations: a single process here, a process group of torch in ``torch_collective.py``.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

from everstep.checkpoint import errors
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
class Outcome:
    """How an action went on all ranks."""

    results: list[Any]
    """The result of each rank; None where its action failed."""
    error: Exception | None
    """The own error."""
    causes: dict[int, str]
    """For each rank that failed, why: the same on all ranks, empty when all succeeded."""
    rank0_error: Exception | None
    """The error of rank 0, on every rank."""


def agree(collective: Collective, tag: str, action: Callable[[], Any]) -> Outcome:
    """Run an action on every rank; tell every rank how it went on all of them.

    The results are JSON-able. Only ``Exception`` is turned into a cause; what means "stop now"
    passes through.
    """
    error: Exception | None = None
    try:
        result = action()
        payload = b"" if result is None else json.dumps({"result": result}).encode()
    except Exception as e:
        error = e
        payload = json.dumps({"cause": describe(e), "error": _portable(e)}).encode()
    replies = [json.loads(r) if r else {} for r in collective.exchange(tag, payload)]
    return Outcome(
        [reply.get("result") for reply in replies],
        error,
        {rank: reply["cause"] for rank, reply in enumerate(replies) if "cause" in reply},
        (error if collective.rank == 0 else None) or _rebuilt(replies[0]),
    )


def on_rank0(collective: Collective, tag: str, action: Callable[[], T]) -> T:
    """Run an action on rank 0 and give its JSON-able result to all ranks.

    Raises:
        Exception: on rank 0 the action's own error, on the others the same where it is one of
            ``everstep.checkpoint.errors``, else a CheckpointError that describes it.
    """
    outcome = agree(collective, tag, action if collective.rank == 0 else lambda: None)
    if outcome.rank0_error is not None:
        raise outcome.rank0_error
    return cast(T, outcome.results[0])


def _portable(error: Exception) -> list[Any] | None:
    """Class name and facts of one of our errors, where these are JSON-able."""
    try:
        same = json.loads(json.dumps(error.args)) == list(error.args)
    except (TypeError, ValueError):
        return None
    known = getattr(errors, type(error).__name__, None) is type(error)
    return [type(error).__name__, *error.args] if known and same else None


def _rebuilt(reply: dict[str, Any]) -> Exception | None:
    if "cause" not in reply:
        return None
    if reply["error"] is None:
        return CheckpointError(reply["cause"])
    name, *facts = reply["error"]
    return cast(Exception, getattr(errors, name)(*facts))


def describe(error: Exception) -> str:
    """One line about an error, for people; never empty."""
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}"
    text = " ".join(str(error).split())
    deliberate = isinstance(error, EverstepError) and text
    return text if deliberate else f"{type(error).__name__}: {text}"
