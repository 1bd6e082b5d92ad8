"""Objects of the user's own code, named in the configuration as 'pkg.module:function'."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from everstep.trainer.errors import ConfigError


def load_factory(reference: str, key: str) -> Callable[..., Any]:
    """The callable that ``reference`` names; ``key`` is the configuration key it was found under.

    The working directory is importable, after everything else on ``sys.path``. Raises ConfigError
    when the reference is malformed, its module cannot be imported, or the name is not callable.
    """
    module_name, colon, name = reference.partition(":")
    if not (module_name and colon and name) or module_name.startswith("."):
        raise ConfigError(f"{key}={reference!r} is not of the form 'pkg.module:function'")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"{key}={reference!r} cannot be imported ({error}): install the package, run in its "
            "folder, or add its folder to PYTHONPATH"
        ) from error
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ConfigError(
            f"{key}={reference!r}: module {module_name!r} has no callable {name!r}; "
            "name a function or class that it defines"
        )
    result: Callable[..., Any] = found
    return result
