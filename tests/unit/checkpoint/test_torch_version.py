"""The check of the installed torch."""

import pytest

from everstep.checkpoint.torch_version import (
    OLDEST_TORCH,
    TorchVersionError,
    check_version,
    parse_version,
    require_torch,
    torch_version,
)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("2.13.0+cpu", (2, 13)),
        ("2.11.0a0+git1234567", (2, 11)),
        ("2.12.0.dev20260101", (2, 12)),
        ("v3.0", (3, 0)),
        ("2.9", (2, 9)),
    ],
)
def test_versions(text: str, version: tuple[int, int]) -> None:
    assert parse_version(text) == version


@pytest.mark.parametrize("text", ["2.11.0", "2.11.0a0+vendor", "2.13.0+cu130", "3.0"])
def test_new_enough(text: str) -> None:
    check_version(text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("2.10.1", r"torch 2\.10\.1 is too old, everstep needs 2\.11 or later: pip install"),
        ("1.13", "is too old"),
        (None, r"torch is not installed, everstep needs 2\.11 or later: pip install torch"),
        ("main", "torch has the version 'main', which does not begin with major"),
    ],
)
def test_unsuitable(text: str | None, sentence: str) -> None:
    with pytest.raises(TorchVersionError, match=sentence):
        check_version(text)


def test_the_installed_one_is_found_without_importing_it() -> None:
    version = torch_version()
    assert version is not None
    assert parse_version(version) >= OLDEST_TORCH
    require_torch()
