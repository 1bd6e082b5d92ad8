"""Votes of writers that failed: a part that says why, where a pack's would be (pure)."""

from pathlib import Path

from everstep.checkpoint.errors import ManifestError
from everstep.checkpoint.records import decode_record, encode_record

_KIND, _VERSION = "everstep_failure", 1
_HEAD = b'{"%s":' % _KIND.encode()
HEAD_BYTES = len(_HEAD)
"""So many first bytes of a part tell whether its writer failed."""


def encode_failure(rank: int, cause: str) -> bytes:
    """The bytes of the part of a writer that could not write."""
    return encode_record(_KIND, _VERSION, {"rank": rank, "cause": cause})


def is_failure(head: bytes) -> bool:
    """Whether a part that begins with these bytes says that its writer failed."""
    return head.startswith(_HEAD)


def failure_in(data: bytes, path: Path | str) -> str | None:
    """Why a writer failed, if this part says that it did; raises ManifestError and its kinds."""
    if not is_failure(data):
        return None
    cause = decode_record(data, _KIND, _VERSION, path).get("cause")
    if not isinstance(cause, str):
        raise ManifestError(path, "its content is not the failure of a writer")
    return cause
