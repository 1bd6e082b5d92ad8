"""Errors come out of JSON as they went in."""

import errno
import json

import pytest

from everstep.checkpoint.errors import (
    BlockChecksumError,
    DirectoryInUseError,
    EverstepError,
    KeeperError,
    LoadFailedError,
    SaveFailedError,
    SlotMemoryError,
    SnapshotSkipped,
    StepExistsError,
    StepNotFoundError,
)
from everstep.checkpoint.keeper.carried import decode_error, encode_error


@pytest.mark.parametrize(
    "error",
    [
        BlockChecksumError("pack", 3, 1, 2),
        DirectoryInUseError("here", "process 3"),
        KeeperError("no"),
        LoadFailedError(4, {0: "damaged", 11: "gone"}, [1, 2]),
        SaveFailedError(4, {0: "No space left on device", 11: "late"}),
        SlotMemoryError("no room"),
        SnapshotSkipped(3, "no slot"),
        StepExistsError("step-3"),
        StepNotFoundError("here", 3, [1, 2]),
    ],
)
def test_own_errors(error: EverstepError) -> None:
    found = decode_error(json.loads(json.dumps(encode_error(error))))
    assert type(found) is type(error)
    assert (str(found), found.args) == (str(error), error.args)


def test_errors_of_the_system() -> None:
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        FileNotFoundError(2, "No", "x"),
    ):
        found = decode_error(json.loads(json.dumps(encode_error(error))))
        assert isinstance(found, OSError)
        assert type(found) is type(error)
        assert (found.errno, found.strerror, found.filename) == (
            error.errno,
            error.strerror,
            error.filename,
        )
    assert str(decode_error(encode_error(OSError("odd")))) == "odd"


def test_others_keep_their_text() -> None:
    found = decode_error(encode_error(ZeroDivisionError("division by zero")))
    assert type(found) is KeeperError
    assert str(found) == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    "coded",
    [
        {},
        {"text": "t", "class": "Mapping", "facts": [1]},
        {"text": "t", "class": "StepExistsError", "facts": []},
        {"text": "t", "class": "SaveFailedError", "facts": [1, 2]},
        {"text": "t", "os": ["x"]},
    ],
)
def test_what_cannot_be_rebuilt(coded: dict[str, object]) -> None:
    assert type(decode_error(coded)) is KeeperError
