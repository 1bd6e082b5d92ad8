"""everstep: fault-tolerant, sharded training on PyTorch that never loses a step.

Importing this package imports nothing heavy: each public name is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everstep.checkpoint.checkpointer import Checkpointer
    from everstep.checkpoint.errors import EverstepError
    from everstep.checkpoint.keeper.client import KeeperMemory
    from everstep.checkpoint.torch_collective import ProcessGroupCollective
    from everstep.checkpoint.torch_state import State
    from everstep.trainer.config import RunConfig
    from everstep.trainer.config_load import dump_config, load_config
    from everstep.trainer.errors import ConfigError

    __version__: str

_HOME = {
    "Checkpointer": "everstep.checkpoint.checkpointer",
    "ConfigError": "everstep.trainer.errors",
    "EverstepError": "everstep.checkpoint.errors",
    "KeeperMemory": "everstep.checkpoint.keeper.client",
    "ProcessGroupCollective": "everstep.checkpoint.torch_collective",
    "RunConfig": "everstep.trainer.config",
    "State": "everstep.checkpoint.torch_state",
    "dump_config": "everstep.trainer.config_load",
    "load_config": "everstep.trainer.config_load",
}
"""Public name -> module that defines it."""
_NEEDS_TORCH = {"Checkpointer", "ProcessGroupCollective", "State"}

__all__ = [
    "Checkpointer",
    "ConfigError",
    "EverstepError",
    "KeeperMemory",
    "ProcessGroupCollective",
    "RunConfig",
    "State",
    "__version__",
    "dump_config",
    "load_config",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _installed_version()
    elif name in _HOME:
        if name in _NEEDS_TORCH:
            importlib.import_module("everstep.checkpoint.torch_version").require_torch()
        value = getattr(importlib.import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'everstep' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _installed_version() -> str:
    from importlib import metadata

    try:
        return metadata.version("everstep")
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "0+source"
