"""Safetensors files as the source of a conversion: one file, or a folder with or without an index.

Files are mapped, checked before they are believed (bounded header, no holes, offsets inside, known
dtypes), and read range by range: pages go back to the system once they were copied. The format has
no checksums, so that a flipped bit inside of data cannot be noticed here.

Source: the format's description in the README of huggingface/safetensors; the index file is that of
transformers (``weight_map``).
"""

import errno
import json
import math
import mmap
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from everstep.checkpoint.convert.errors import SafetensorsError
from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.errors import CheckpointError
from everstep.checkpoint.kernels import copy_box
from everstep.checkpoint.layout import ITEM_BYTES, Box, TensorSpec
from everstep.checkpoint.pack import StridedBytes, dense_strides
from everstep.checkpoint.pieces import pieces

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100 * 10**6
MAX_INDEX_BYTES = 2**28
_FETCH_BYTES = 16 * 2**20
_MADV_POPULATE_READ = 22
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


class SafetensorsFile:
    """One mapped file; a context manager.

    Raises:
        SafetensorsError: it is not valid safetensors.
        OSError: as the file system reports it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            self._starts, self.tensors = _read_header(path, file.read(8), size, file)
            self._map = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
        self._bytes: ByteArray = np.frombuffer(self._map, np.uint8)

    def fill(self, name: str, wanted: Box, target: StridedBytes) -> None:
        """See ``Source``."""
        spec = self.tensors[name]
        strides = dense_strides(spec.shape, spec.item_bytes)
        for box in pieces(wanted, _FETCH_BYTES // spec.item_bytes):
            first = self._starts[name] + _dot(box.offset, strides)
            last = first + _dot([n - 1 for n in box.shape], strides) + spec.item_bytes
            self._advise(_MADV_POPULATE_READ, first, last)
            copy_box(
                target.buffer,
                target.offset_bytes + _dot(box.relative_to(wanted), target.strides_bytes),
                target.strides_bytes,
                self._bytes,
                first,
                strides,
                box.shape,
                spec.item_bytes,
            )
            self._advise(mmap.MADV_DONTNEED, first, last)

    def close(self) -> None:
        """Let go of the file."""
        del self._bytes, self._map

    def _advise(self, advice: int, begin: int, end: int) -> None:
        """Read a range at once, so that an I/O error is an exception, not a SIGBUS; or drop it."""
        begin -= begin % mmap.PAGESIZE
        try:
            self._map.madvise(advice, begin, end - begin)
        except OSError as e:
            if e.errno != errno.EINVAL:  # EINVAL: Linux before 5.14, which reads as it goes
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(self._path)) from e


class SafetensorsSource:
    """All tensors of a file or folder; a context manager.

    Args:
        path: a file; or a folder, of which the index says what belongs to it, else all its files.
        with_file: tensors are named ``FILE/TENSOR``, FILE without its suffix.

    Raises:
        SafetensorsError: a file is not valid, or not what the index says.
        CheckpointError: there are no such files.
    """

    def __init__(self, path: Path, *, with_file: bool = False) -> None:
        self._owners: dict[str, tuple[SafetensorsFile, str]] = {}
        self._files = ExitStack()
        with ExitStack() as opened:
            for file_path, expected in _files_of(path).items():
                file = SafetensorsFile(file_path)
                opened.callback(file.close)
                self._take(file, file_path, expected, with_file)
            self._files = opened.pop_all()
        self.tensors: Mapping[str, TensorSpec] = {
            name: TensorSpec(name, (spec := file.tensors[inner]).dtype, spec.shape)
            for name, (file, inner) in self._owners.items()
        }

    def fill(self, name: str, wanted: Box, target: StridedBytes) -> None:
        """See ``Source``."""
        file, inner = self._owners[name]
        file.fill(inner, wanted, target)

    def close(self) -> None:
        """Let go of all files; may be called twice."""
        self._files.close()

    def __enter__(self) -> "SafetensorsSource":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _take(
        self, file: SafetensorsFile, path: Path, expected: set[str] | None, with_file: bool
    ) -> None:
        if expected is not None and expected != file.tensors.keys():
            wrong = sorted(expected ^ file.tensors.keys())
            raise SafetensorsError(
                path,
                f"it and the index beside it disagree about {len(wrong)} tensors, such as "
                f"{wrong[0]!r}",
            )
        for inner in file.tensors:
            name = f"{path.stem}/{inner}" if with_file else inner
            if name in self._owners:
                raise SafetensorsError(path, f"tensor {name!r} is in another file of it, too")
            self._owners[name] = (file, inner)


def _files_of(path: Path) -> Mapping[Path, set[str] | None]:
    """The files that make a source, each with the tensors that it must have (None: any)."""
    if not path.exists():
        raise CheckpointError(
            f"there is no {path}: give a .safetensors file, or a folder that has some"
        )
    if path.is_file():
        return {path: None}
    index = path / INDEX_NAME
    if index.is_file():
        found: dict[Path, set[str]] = {}
        for name, file in _read_index(index).items():
            found.setdefault(path / file, set()).add(name)
        for file_path in found:
            if not file_path.is_file():
                raise SafetensorsError(file_path, f"the file is missing, {INDEX_NAME} names it")
        return found
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if not files:
        raise CheckpointError(
            f"{path} has no safetensors: give a .safetensors file, or a folder that has some"
        )
    return dict.fromkeys(files)


def _read_index(path: Path) -> dict[str, str]:
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise SafetensorsError(path, f"it is larger than {MAX_INDEX_BYTES} bytes")
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("its weight_map is no mapping")
        for file in weight_map.values():
            if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
                raise ValueError(f"{file!r} is no name of a file beside it")
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise SafetensorsError(path, f"it is no index: {e}") from None
    return weight_map


def _read_header(
    path: Path, length: bytes, size: int, file: Any
) -> tuple[dict[str, int], dict[str, TensorSpec]]:
    """(start in the file of each tensor, the tensors)."""
    n = int.from_bytes(length, "little")
    if len(length) != 8 or n > min(MAX_HEADER_BYTES, size - 8):
        raise SafetensorsError(
            path,
            f"it is no safetensors file, or cut short: of its {size} bytes {n} would be a header",
        )
    try:
        entries = json.loads(file.read(n))
        if not isinstance(entries.pop("__metadata__", {}), dict):
            raise ValueError("its metadata is no mapping")
        found = [_decode_entry(name, entry) for name, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise SafetensorsError(path, f"its header is not valid: {e}") from None
    position = 0
    for begin, end, spec in sorted(found, key=lambda f: f[:2]):
        if begin != position:
            raise SafetensorsError(path, f"tensor {spec.name!r} begins at {begin}, not {position}")
        position = end
    if 8 + n + position != size:
        raise SafetensorsError(path, f"it has {size} bytes, expected {8 + n + position}")
    starts = {spec.name: 8 + n + begin for begin, _, spec in found}
    return starts, {spec.name: spec for _, _, spec in found}


def _decode_entry(name: str, entry: Any) -> tuple[int, int, TensorSpec]:
    shape, (begin, end), dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    if dtype not in ITEM_BYTES:
        raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if any(type(x) is not int or not 0 <= x < 2**60 for x in (*shape, begin, end)):
        raise ValueError(f"tensor {name!r} has a shape or offsets that are no natural numbers")
    spec = TensorSpec(name, dtype, tuple(shape))
    if end - begin != math.prod(shape) * spec.item_bytes:
        raise ValueError(f"tensor {name!r} of shape {shape} has {end - begin} bytes")
    return begin, end, spec


def _dot(index: Any, strides: Any) -> int:
    return sum(int(i) * int(s) for i, s in zip(index, strides, strict=True))
