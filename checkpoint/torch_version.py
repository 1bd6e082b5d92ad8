"""The check of the installed torch, done before torch is imported.

torch is an unversioned requirement, so that pip never replaces a vendor's build; this is where an
unsuitable one is noticed, with a sentence instead of an AttributeError deep inside FSDP.
"""

import importlib.util
import re
from functools import cache
from importlib import metadata

from everstep.checkpoint.errors import EverstepError

OLDEST_TORCH = (2, 11)


class TorchVersionError(EverstepError):
    """torch is not installed, or older than everstep needs."""


def parse_version(text: str) -> tuple[int, int]:
    """(major, minor) of a version such as '2.13.0+cpu' or '2.11.0a0+git1234'."""
    match = re.match(r"v?(\d+)\.(\d+)", text.strip())
    if match is None:
        raise TorchVersionError(
            f"torch has the version {text!r}, which does not begin with major.minor; everstep "
            f"needs {_OLDEST} or later: install a released torch"
        )
    return int(match[1]), int(match[2])


def check_version(text: str | None) -> None:
    """Raise TorchVersionError unless ``text`` is new enough; None means not installed."""
    if text is None:
        raise TorchVersionError(
            f"torch is not installed, everstep needs {_OLDEST} or later: pip install torch, or the "
            "command for your GPU from pytorch.org/get-started"
        )
    if parse_version(text) < OLDEST_TORCH:
        raise TorchVersionError(
            f"torch {text} is too old, everstep needs {_OLDEST} or later: pip install --upgrade "
            "torch"
        )


def torch_version() -> str | None:
    """Version of the installed torch, read without importing it; None when there is none."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        if importlib.util.find_spec("torch") is None:
            return None
    import torch  # built from source without package metadata: only torch itself knows

    return str(torch.__version__)


@cache
def require_torch() -> None:
    """Call before ``import torch``; raises TorchVersionError when it is missing or too old."""
    check_version(torch_version())


_OLDEST = ".".join(map(str, OLDEST_TORCH))
