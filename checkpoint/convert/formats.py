"""Every format that steps are exported to and imported from: its function, and what it needs."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from everstep.checkpoint.convert.errors import MissingPackageError


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way out, or in.

    The function of an export takes ``(reader, target, *, budget_bytes, on_bytes, ...)`` and returns
    bytes; that of an import ``(source, target_directory, *, budget_bytes, on_bytes, ...)`` and
    returns the path of the step.
    """

    name: str
    help: str
    function_name: str
    """'module:function'; imported when it is used, because some need torch or more."""
    options: tuple[str, ...]
    """Keywords of the function besides ``budget_bytes`` and ``on_bytes``."""
    packages: Mapping[str, str]
    """Package -> the extra of ours that brings it."""

    def load(self) -> Callable[..., Any]:
        """The function. Raises MissingPackageError."""
        for package, extra in self.packages.items():
            if importlib.util.find_spec(package) is None:
                raise MissingPackageError(f"format {self.name!r}", package, extra)
        module, _, name = self.function_name.partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function


_HERE = "everstep.checkpoint.convert"
EXPORTS = {
    f.name: f
    for f in (
        Format(
            name="hf",
            help="a folder that transformers' LlamaForCausalLM.from_pretrained loads",
            function_name=f"{_HERE}.hf:export_hf",
            options=("dtype", "max_shard_bytes", "tokenizer"),
            packages={},
        ),
        Format(
            name="safetensors",
            help="one safetensors file",
            function_name=f"{_HERE}.plain:export_safetensors",
            options=("what", "dtype"),
            packages={},
        ),
        Format(
            name="torch",
            help="a state dict for torch.load(..., weights_only=True)",
            function_name=f"{_HERE}.torch_file:export_torch",
            options=("what", "dtype"),
            packages={},
        ),
        Format(
            name="zarr",
            help="a Zarr v3 archive: sharded, compressed, with checksums",
            function_name=f"{_HERE}.zarr_archive:export_zarr",
            options=("what", "dtype", "level"),
            packages={"tensorstore": "views"},
        ),
    )
}
IMPORTS = {
    f.name: f
    for f in (
        Format(
            name="hf",
            help="a folder with config.json and safetensors of a Llama",
            function_name=f"{_HERE}.hf:import_hf",
            options=("dtype",),
            packages={},
        ),
    )
}
