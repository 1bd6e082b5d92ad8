"""Parts of writers that failed."""

import pytest

from everstep.checkpoint.errors import ManifestChecksumError, ManifestError
from everstep.checkpoint.records import encode_record
from everstep.checkpoint.votes import encode_failure, failure_in


def test_there_and_back() -> None:
    assert failure_in(encode_failure(3, "No space left"), "p") == "No space left"
    assert failure_in(encode_record("everstep_part", 1, {}), "p") is None


def test_damage_is_noticed() -> None:
    data = bytearray(encode_failure(3, "No space left"))
    data[40] ^= 1
    with pytest.raises(ManifestChecksumError):
        failure_in(bytes(data), "p")
    with pytest.raises(ManifestError, match="p is damaged: its content is not the failure"):
        failure_in(encode_record("everstep_failure", 1, {"rank": 0, "cause": 3}), "p")
