"""JSON records that vouch for themselves: the last member is a CRC-32C of everything before it.

A record is one valid JSON object. Its bytes are ``BODY,"crc32c":"xxxxxxxx"}\\n`` and the checksum
is over ``BODY``, so that every flipped bit, version included, is noticed.
"""

import json
import re
from pathlib import Path
from typing import Any

from everstep.checkpoint.errors import (
    ManifestChecksumError,
    ManifestError,
    ManifestVersionError,
)
from everstep.checkpoint.kernels import crc32c
from everstep.checkpoint.store import Store

MAX_RECORD_BYTES = 2**28
_TAIL = re.compile(rb',"crc32c":"([0-9a-f]{8})"}\n')
_TAIL_BYTES = len(b',"crc32c":"00000000"}\n')


def encode_record(kind: str, version: int, members: dict[str, Any]) -> bytes:
    """The bytes of a record; the same members give the same bytes.

    Raises:
        ValueError: a value is not JSON (NaN and infinity are not).
    """
    body = json.dumps({kind: version, **members}, separators=(",", ":"), allow_nan=False)
    data = body[:-1].encode()
    return data + b',"crc32c":"%08x"}\n' % crc32c(data)


def decode_record(data: bytes, kind: str, version: int, path: Path | str) -> dict[str, Any]:
    """The members of a record, checked.

    Raises:
        ManifestChecksumError: some byte is not what was written.
        ManifestVersionError: written by a newer format version.
        ManifestError: it is not such a record.
    """
    tail = _TAIL.fullmatch(data[-_TAIL_BYTES:])
    if tail is None:
        raise ManifestChecksumError(path, "it does not end with its checksum (cut short?)")
    body = data[:-_TAIL_BYTES]
    found = crc32c(body)
    if found != int(tail[1], 16):
        raise ManifestChecksumError(
            path, f"its checksum is {found:08x}, expected {tail[1].decode()}"
        )
    try:
        members = json.loads(body.decode() + "}", parse_constant=_refuse)
    except (ValueError, RecursionError) as e:
        raise ManifestError(path, f"it is not JSON: {e}") from None
    if not isinstance(members, dict) or type(members.get(kind)) is not int or members[kind] < 1:
        raise ManifestError(path, f"it is not a record of kind {kind!r}")
    if members[kind] > version:
        raise ManifestVersionError(
            path,
            f"it has format version {members[kind]}, this everstep reads up to {version}: "
            "update everstep",
        )
    return members


def read_record(store: Store, key: str, missing: str = "the file is missing") -> bytes:
    """The bytes of a record.

    Args:
        store: where it is.
        key: its key.
        missing: what to say where there is none.

    Raises:
        ManifestError: it is missing or absurdly large.
    """
    try:
        data = store.read(key, 0, MAX_RECORD_BYTES + 1)
    except FileNotFoundError:
        raise ManifestError(store.describe(key), missing) from None
    if len(data) > MAX_RECORD_BYTES:
        raise ManifestError(store.describe(key), f"it is larger than {MAX_RECORD_BYTES} bytes")
    return data


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON value")
