"""Which rank failed first, and how to say so in one sentence: pure functions.

When one rank dies, its peers soon fail too, with errors about lost connections; often they are
noticed earlier than the death itself. So failures are ranked by what they prove before they are
ranked by time.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from everstep.cluster import exit_codes
from everstep.cluster.driver import RankExit

_LOST_PEER_TYPES = frozenset(
    {
        "DistBackendError",
        "DistNetworkError",
        "DistStoreError",
        "ConnectionError",
        "ConnectionResetError",
        "ConnectionRefusedError",
        "ConnectionAbortedError",
        "BrokenPipeError",
    }
)
_LOST_PEER_TEXT = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|gloo|nccl|tcpstore"
    r"|timed out waiting|wait timeout|socket timeout|recvvalue|sendbytes|\bpeer\b",
    re.IGNORECASE,
)
_MEMORY_ERRORS = frozenset({"OutOfMemoryError", "MemoryError"})
LESS_MEMORY = (
    "use a smaller data.micro_batch, parallel.activation_checkpointing=true, or more ranks"
)
_HUNG = (
    "another rank hangs or is slower than parallel.timeout_s: their logs and stacks (SIGUSR1) say "
    "which, or raise parallel.timeout_s"
)
_SIGNAL_ADVICE = {
    "SIGKILL": f"often the out-of-memory killer: {LESS_MEMORY}",
    "SIGSEGV": "a crash in native code: its log shows where",
    "SIGABRT": "native code gave up: its log shows why",
    "SIGBUS": "often a full /dev/shm or disk: make room, and start again",
    "SIGILL": "native code for another CPU: install a build for this one",
}


class Proof(IntEnum):
    """How likely a failure is the first one; lower is likelier."""

    OWN = 0
    """The rank raised an error of its own, or something killed it."""
    ABORTED = 1
    """Native code of the rank gave up, which a lost peer can bring about."""
    LOST_PEER = 2
    """The rank only noticed that another one is gone."""


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Why a run failed."""

    rank: int
    """The first rank that failed."""
    sentence: str
    """For a person: what happened, and the way out where one is known."""
    brief: str = "failed"
    """What happened, to follow 'rank N', where no way out is needed."""
    traceback_file: str | None
    """Where the full trace is."""
    exit_code: int
    alike: tuple[int, ...] = ()
    """Other ranks that failed in the same way."""
    others: tuple[int, ...] = ()
    """Ranks that failed in another way, and not because of a lost peer."""


@dataclass(frozen=True, kw_only=True)
class _Failure:
    rank: int
    proof: Proof
    time_s: float
    sentence: str
    brief: str
    traceback_file: str | None
    exit_code: int
    deliberate: bool


def error_lost_peer(type_name: str, message: str) -> bool:
    """Whether an error says no more than that the connection to another rank broke."""
    return type_name in _LOST_PEER_TYPES or (
        type_name == "RuntimeError" and _LOST_PEER_TEXT.search(message) is not None
    )


def exit_lost_peer(code: int) -> bool:
    """Whether a lost peer can make a rank end this way (gloo aborts the process)."""
    return RankExit(rank=0, code=code, time_s=0).signal_name == "SIGABRT"


def first_cause(errors: Sequence[Mapping[str, Any]], exits: Sequence[RankExit]) -> Cause | None:
    """The failure that the others followed from; None where no rank failed.

    Args:
        errors: reports of kind "error", in order of arrival.
        exits: ends of ranks that nobody asked for, in order of arrival.
    """
    failures: dict[int, _Failure] = {}
    for error in errors:
        failures.setdefault(int(error["rank"]), _from_error(error))
    for ended in exits:
        if ended.code not in (exit_codes.DONE, exit_codes.STOPPED):
            failures.setdefault(ended.rank, _from_exit(ended))
    if not failures:
        return None
    first, *rest = sorted(failures.values(), key=lambda f: (f.proof, f.time_s, f.rank))
    alike = tuple(f.rank for f in rest if f.sentence == first.sentence)
    others = tuple(f.rank for f in rest if f.rank not in alike and f.proof is Proof.OWN)
    return Cause(
        rank=first.rank,
        sentence=first.sentence if first.deliberate else _with_rank(first),
        brief=first.brief,
        traceback_file=first.traceback_file,
        exit_code=first.exit_code,
        alike=tuple(sorted(alike)),
        others=tuple(sorted(others)),
    )


def one_line(message: str, limit: int = 400) -> str:
    """The first line of a message that says something, cut where it gets too long to read."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _from_error(error: Mapping[str, Any]) -> _Failure:
    type_name, message = str(error["type"]), str(error["message"])
    deliberate = bool(error.get("deliberate"))
    if deliberate:
        sentence = " ".join(message.split())
    else:
        detail = one_line(message)
        sentence = f"failed with {type_name}: {detail}" if detail else f"failed with {type_name}"
        if type_name in _MEMORY_ERRORS or "can't allocate memory" in message:
            sentence = f"{sentence.rstrip('.')}; {LESS_MEMORY}"
        elif "No space left on device" in message:
            sentence = f"{sentence}; make room on that disk, and start again"
        elif "timed out" in message.lower() and error_lost_peer(type_name, message):
            sentence = f"{sentence}; {_HUNG}"
    lost_peer = not deliberate and error_lost_peer(type_name, message)
    return _Failure(
        rank=int(error["rank"]),
        proof=Proof.LOST_PEER if lost_peer else Proof.OWN,
        time_s=float(error.get("time", 0.0)),
        sentence=sentence,
        brief="lost its connection to another rank" if lost_peer else f"failed with {type_name}",
        traceback_file=error.get("traceback_file"),
        exit_code=exit_codes.of_error(type_name),
        deliberate=deliberate,
    )


def _from_exit(ended: RankExit) -> _Failure:
    name = ended.signal_name
    if ended.why is not None:
        sentence, brief = ended.why, ended.why.partition(": ")[0]
    elif name is None:
        sentence = brief = f"ended with exit code {ended.code} without saying why"
    else:
        brief = f"was killed ({name})"
        sentence = f"was killed by signal {-ended.code} ({name})"
        if name in _SIGNAL_ADVICE:
            sentence = f"{sentence}, {_SIGNAL_ADVICE[name]}"
    return _Failure(
        rank=ended.rank,
        proof=Proof.ABORTED if exit_lost_peer(ended.code) else Proof.OWN,
        time_s=ended.time_s,
        sentence=sentence,
        brief=brief,
        traceback_file=None,
        exit_code=exit_codes.FAILED,
        deliberate=False,
    )


def _with_rank(failure: _Failure) -> str:
    return f"rank {failure.rank} {failure.sentence}"
