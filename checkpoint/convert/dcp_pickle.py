"""The ``.metadata`` of a plain DCP checkpoint, which is a pickle, read without trusting it.

Only the names that DCP's writer uses are known. Classes become stand-ins made for one reading, so
that no torch class is built, called or changed; opcodes that can ask for memory before there is
data are not known at all. What is read is checked in ``dcp_source``.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from everstep.checkpoint.errors import CheckpointError, DamagedError
from everstep.checkpoint.records import MAX_RECORD_BYTES

_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed._shard.sharded_tensor.metadata": {
        "TensorProperties",
        "MEM_FORMAT_ENCODING",
    },
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
}
_REFUSED_OPCODES = (
    pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.PERSID, pickle.BINPERSID,
    pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX,
)  # fmt: skip


class DcpFormatError(DamagedError):
    """A file of a plain DCP checkpoint is not what DCP's writer writes."""


class StandIn:
    """What was a class of torch: its name, and the arguments and the state that it was given."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, field: str) -> Any:
        """A field of a dataclass; None where it has none of this name."""
        return self.state.get(field) if isinstance(self.state, dict) else None

    def is_a(self, name: str) -> bool:
        """Whether it was of the class of this name."""
        return type(self).__name__ == name


class _Reader(pickle._Unpickler):  # the one in C takes memory for any number of memo places
    dispatch = {  # noqa: RUF012
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if code not in {refused[0] for refused in _REFUSED_OPCODES}
    }

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._known: dict[tuple[str, str], type[StandIn]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a class; raises UnpicklingError for every other name."""
        if name in _CLASSES.get(module, ()):
            made = self._known.setdefault((module, name), type(name, (StandIn,), {}))
            return made
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("builtins", "getattr"):
            return _member
        found = getattr(torch, name, None) if module == "torch" and "." not in name else None
        if isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _member(of: Any, name: Any) -> StandIn:
    """A member of an enumeration by its name, which is how Python 3.11.0 to 3.11.3 pickle it."""
    if isinstance(of, type) and issubclass(of, StandIn) and isinstance(name, str):
        return of(name)
    raise pickle.UnpicklingError("it asks for builtins.getattr")


def read_metadata_file(path: Path) -> StandIn:
    """The object in a ``.metadata`` file, a stand-in of DCP's ``Metadata``.

    Raises:
        CheckpointError: it is missing.
        DcpFormatError: it is absurdly large, or not what DCP writes: it asks for other
            classes than those of DCP's metadata, such as those that a planner of the user left.
    """
    try:
        with path.open("rb") as f:
            data = f.read(MAX_RECORD_BYTES + 1)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} is no checkpoint of torch DCP: it has no {path.name}, the file that "
            "DCP writes last, when one coordinator has seen all ranks"
        ) from None
    if len(data) > MAX_RECORD_BYTES:
        raise DcpFormatError(path, f"it is larger than {MAX_RECORD_BYTES} bytes")
    try:
        found = _Reader(data).load()
    except Exception as e:  # any byte may be anything: pickles fail in every way
        raise DcpFormatError(
            path, f"it is not metadata of DCP: {e}; only DCP's own classes are read"
        ) from None
    if not isinstance(found, StandIn) or not found.is_a("Metadata"):
        raise DcpFormatError(path, "it holds something else than metadata of DCP")
    return found
