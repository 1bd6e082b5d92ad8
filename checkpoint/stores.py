"""From a path or URL to the store behind it."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from everstep.checkpoint.store import Store
from everstep.checkpoint.store_fsspec import FsspecStore
from everstep.checkpoint.store_local import LocalStore

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")
_LOCAL = ("file://", "local://")


def open_store(
    where: str | os.PathLike[str] | Store,
    *,
    storage_options: Mapping[str, Any] | None = None,
    single_writer: bool = False,
) -> Store:
    """The store of a path (also ``file://``), of any URL that fsspec knows, or the one given.

    Raises:
        CheckpointError: see ``FsspecStore``.
    """
    if isinstance(where, str) and is_url(where):
        return FsspecStore(where, storage_options, single_writer=single_writer)
    if isinstance(where, str | os.PathLike):
        return LocalStore(Path(without_scheme(os.fspath(where))))
    return where


def without_scheme(where: str) -> str:
    """A path that is written as a URL (``file://``) as what it is; anything else as it stands."""
    for scheme in _LOCAL:
        where = where.removeprefix(scheme)
    return where


def is_url(where: str) -> bool:
    """Whether this names a store that is no local path."""
    return _URL.match(where) is not None and not where.startswith(_LOCAL)
