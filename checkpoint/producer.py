"""What a manifest says of the programs that wrote it."""

import platform
from importlib import metadata


def producer(**more: str) -> dict[str, str]:
    """Versions by name, of everstep and Python, and whatever else is to be told."""
    try:
        version = metadata.version("everstep")
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        version = "unknown"
    return {"everstep": version, **more, "python": platform.python_version()}
