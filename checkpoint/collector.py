"""Pauses of Python's cyclic garbage collector."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """While millions of objects are made that all stay and form no cycles.

    The collector would look through them again and again, and find nothing: half of the time that
    decoding a large manifest takes.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
