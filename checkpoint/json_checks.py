"""Checks of what was decoded from JSON: each returns the value, or raises ValueError (pure)."""

import reprlib
from typing import Any

from everstep.checkpoint.layout import ITEM_BYTES

MAX_NATURAL = 2**60


def natural(value: Any) -> int:
    """A number from 0 on, below ``MAX_NATURAL``."""
    if type(value) is not int or not 0 <= value < MAX_NATURAL:
        raise ValueError(f"{reprlib.repr(value)} is not a natural number")
    return value


def extents(value: Any) -> tuple[int, ...]:
    """A natural number for each of at most 32 dims."""
    if type(value) is not list or len(value) > 32:
        raise ValueError(f"{reprlib.repr(value)} is not a shape")
    for n in value:
        if type(n) is not int or not 0 <= n < MAX_NATURAL:
            raise ValueError(f"{reprlib.repr(n)} is not a natural number")
    return tuple(value)


def text(value: Any) -> str:
    """Text that can be encoded: a lone surrogate is none."""
    if not isinstance(value, str):
        raise ValueError(f"{reprlib.repr(value)} is not text")
    if not value.isascii():
        value.encode()
    return value


def dtype(value: Any) -> str:
    """The name of a dtype."""
    if type(value) is not str or value not in ITEM_BYTES:
        raise ValueError(f"dtype {reprlib.repr(value)} is not one of {', '.join(ITEM_BYTES)}")
    return value


def mapping(value: Any) -> dict[str, Any]:
    """An object."""
    if not isinstance(value, dict):
        raise ValueError(f"{reprlib.repr(value)} is not a mapping")
    return value
