"""Votes of writers that failed: a part that says why, where a pack's would be (pure)."""

from pathlib import Path

from everstep.checkpoint.errors import ManifestError
from everstep.checkpoint.records import decode_record, encode_record

_KIND, _VERSION = "everstep_failure", 1


def encode_failure(rank: int, cause: str) -> bytes:
    """The bytes of the part of a writer that could not write."""
    return encode_record(_KIND, _VERSION, {"rank": rank, "cause": cause})


def failure_in(data: bytes, path: Path | str) -> str | None:
    """Why a writer failed, if this part says that it did; raises ManifestError and its kinds."""
    if not data.startswith(b'{"%s":' % _KIND.encode()):
        return None
    cause = decode_record(data, _KIND, _VERSION, path).get("cause")
    if not isinstance(cause, str):
        raise ManifestError(path, "its content is not the failure of a writer")
    return cause
