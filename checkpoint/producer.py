"""What a manifest says of the programs that wrote it."""

import platform
from functools import cache
from importlib import metadata


def producer(**more: str) -> dict[str, str]:
    """Versions by name, of everstep and Python, and whatever else is to be told."""
    return {"everstep": _version(), **more, "python": platform.python_version()}


@cache
def _version() -> str:
    try:
        return metadata.version("everstep")
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"
