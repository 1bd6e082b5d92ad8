"""Records that vouch for themselves."""

import json
from pathlib import Path

import pytest

from everstep.checkpoint import records
from everstep.checkpoint.errors import (
    ManifestChecksumError,
    ManifestError,
    ManifestVersionError,
)
from everstep.checkpoint.kernels import crc32c
from everstep.checkpoint.records import decode_record, encode_record, read_record
from everstep.checkpoint.store_local import LocalStore

MEMBERS = {"step": 7, "name": "grün", "nested": {"list": [1, 2.5, None]}}


def _sealed(body: bytes) -> bytes:
    """Any body with a checksum that fits."""
    return body + b',"crc32c":"%08x"}\n' % crc32c(body)


def test_there_and_back() -> None:
    data = encode_record("kind", 2, MEMBERS)
    assert decode_record(data, "kind", 2, "f").items() >= MEMBERS.items()
    assert data == encode_record("kind", 2, MEMBERS)


def test_it_is_one_json_object_on_one_line() -> None:
    data = encode_record("kind", 2, MEMBERS)
    assert json.loads(data)["crc32c"] == "{:08x}".format(crc32c(data[: data.rindex(b',"crc32c"')]))
    assert data.count(b"\n") == 1


def test_every_flipped_bit_is_noticed() -> None:
    data = encode_record("kind", 1, MEMBERS)
    for position in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            with pytest.raises(ManifestChecksumError, match=r"^f is damaged"):
                decode_record(bytes(damaged), "kind", 1, "f")


def test_every_truncation_and_anything_appended_is_noticed() -> None:
    data = encode_record("kind", 1, MEMBERS)
    for length in range(len(data)):
        with pytest.raises(ManifestChecksumError):
            decode_record(data[:length], "kind", 1, "f")
    for tail in (b"\n", b"\0", data):
        with pytest.raises(ManifestError):
            decode_record(data + tail, "kind", 1, "f")


def test_a_newer_version_is_named() -> None:
    data = encode_record("kind", 3, MEMBERS)
    with pytest.raises(ManifestVersionError, match=r"version 3.* up to 2: update everstep"):
        decode_record(data, "kind", 2, "f")


@pytest.mark.parametrize(
    "body",
    [
        b'{"other":1',
        b'{"kind":"1"',
        b'{"kind":true',
        b'{"kind":0',
        b'{"kind":1,"x":NaN',
        b'{"kind":1,"x":-Infinity',
        b'{"kind":1,"x":"\xff"',
        b'{"kind":1,"x":' + b"9" * 5000,
        b'{"kind":1,"x":' + b"[" * 100_000,
        b"[1",
        b'"kind"',
        b"",
    ],
    ids=lambda body: body[:24].decode(errors="replace"),
)
def test_a_right_checksum_over_something_else(body: bytes) -> None:
    with pytest.raises(ManifestError):
        decode_record(_sealed(body), "kind", 1, "f")


def test_values_that_are_not_json() -> None:
    with pytest.raises(ValueError):
        encode_record("kind", 1, {"x": float("nan")})


def test_missing_and_absurdly_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    with pytest.raises(ManifestError, match=r"none\.json is damaged: the file is missing"):
        read_record(store, "none.json")
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 10)
    (tmp_path / "big").write_bytes(bytes(11))
    with pytest.raises(ManifestError, match="larger than 10 bytes"):
        read_record(store, "big")
    (tmp_path / "big").write_bytes(bytes(10))
    assert read_record(store, "big") == bytes(10)
