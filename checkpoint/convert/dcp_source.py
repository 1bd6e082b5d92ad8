"""A directory that plain ``dcp.save`` wrote, as tensors and objects that can be read."""

import io
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch

from everstep.checkpoint.convert.dcp_pickle import DcpFormatError, StandIn, read_metadata_file
from everstep.checkpoint.errors import LayoutError
from everstep.checkpoint.layout import Box, TensorSpec
from everstep.checkpoint.torch_layout import DTYPE_NAMES, live_tensor

METADATA = ".metadata"
MAX_OBJECT_BYTES = 2**30


@dataclass(frozen=True)
class Place:
    """Where DCP keeps a chunk or an object: a stream of ``torch.save`` inside a file."""

    file: str
    offset_bytes: int
    length_bytes: int


class DcpSource:
    """Reads a plain DCP checkpoint, one stored chunk in memory at a time.

    Args:
        path: its directory.

    Raises:
        DcpFormatError: its metadata are not what DCP writes.
        LayoutError: a tensor has a dtype that cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        file = self.path / METADATA
        metadata = read_metadata_file(file)
        try:
            places = _places(metadata.get("storage_data"))
            described = _mapping(metadata.get("state_dict_metadata"))
            self.chunks = {
                _text(name): {box: places[name, box.offset] for box in _boxes(tensor)}
                for name, tensor in described.items()
                if not tensor.is_a("BytesStorageMetadata")
            }
            self.objects: Mapping[str, Place] = {
                _text(name): places[name, None]
                for name, entry in described.items()
                if entry.is_a("BytesStorageMetadata")
            }
            self.tensors: Mapping[str, TensorSpec] = {
                name: _spec(name, described[name]) for name in self.chunks
            }
            self.paths = _paths(metadata.get("planner_data"))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
            raise DcpFormatError(file, f"its content is not metadata of DCP: {e!r}") from None
        self._kept: tuple[tuple[str, Box], torch.Tensor] | None = None

    def chunk(self, name: str, box: Box) -> torch.Tensor:
        """A stored chunk, whole; the one that was read last is kept.

        Whether chunks cover the tensor is the caller's to check.

        Raises:
            DcpFormatError: a file is not what the metadata say.
        """
        if self._kept is None or self._kept[0] != (name, box):
            self._kept = None  # before the next is read: one at a time
            self._kept = (name, box), self._load(name, box)
        return self._kept[1]

    def object_bytes(self, name: str) -> bytes:
        """What DCP has pickled of an object; never unpickled here."""
        place = self.objects[name]
        if place.length_bytes > MAX_OBJECT_BYTES:
            raise DcpFormatError(
                self.path / place.file, f"its object {name!r} has {place.length_bytes} bytes"
            )
        with self._open(place) as stream:
            return stream.read()

    def _load(self, name: str, box: Box) -> torch.Tensor:
        place, spec = self.chunks[name][box], self.tensors[name]
        file = self.path / place.file
        if place.length_bytes < box.size * spec.item_bytes:
            raise DcpFormatError(file, f"it has too few bytes for {name!r}")
        try:
            with self._open(place) as stream:
                check_stored(stream)
                found = torch.load(stream, map_location="cpu", weights_only=True)
            local = live_tensor(name, found).local
        except (
            EOFError, RuntimeError, ValueError, TypeError, AttributeError, KeyError, LayoutError,
            pickle.UnpicklingError, zipfile.BadZipFile,
        ) as e:  # fmt: skip
            raise DcpFormatError(file, f"it holds no tensor for {name!r}: {e}") from None
        if (DTYPE_NAMES[local.dtype], tuple(local.shape)) != (spec.dtype, box.shape):
            raise DcpFormatError(
                file,
                f"a chunk of {name!r} is {local.dtype} {list(local.shape)}, the metadata say "
                f"{spec.dtype} {list(box.shape)}",
            )
        return local

    def _open(self, place: Place) -> "io.BufferedReader[_Slice]":
        path = self.path / place.file
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise DcpFormatError(path, "the file is missing") from None
        stream = io.BufferedReader(_Slice(descriptor, place))
        if os.fstat(descriptor).st_size < place.offset_bytes + place.length_bytes:
            stream.close()
            raise DcpFormatError(path, "it is shorter than the metadata say")
        return stream


class _Slice(io.RawIOBase):
    """A range of a file as a file of its own; closes the descriptor."""

    def __init__(self, descriptor: int, place: Place) -> None:
        self._descriptor, self._place, self._at = descriptor, place, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._place.length_bytes}
        self._at = max(0, base[whence] + offset)
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        count = min(len(view), max(0, self._place.length_bytes - self._at))
        done = os.preadv(self._descriptor, [view[:count]], self._place.offset_bytes + self._at)
        self._at += done
        return done

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def check_stored(stream: IO[bytes]) -> None:
    """Nothing in the archive is larger than the file: torch compresses nothing.

    Raises:
        ValueError: something is compressed.
        zipfile.BadZipFile: it is no archive, as torch once wrote them.
    """
    with zipfile.ZipFile(stream) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"its entry {entry.filename!r} is compressed")
    stream.seek(0)


def _places(stored: Any) -> dict[tuple[str, tuple[int, ...] | None], Place]:
    found = {}
    for index, info in _mapping(stored).items():
        if info.get("transform_descriptors"):
            raise ValueError("its files went through extensions of DCP, such as compression")
        file = PurePosixPath(_text(info.get("relative_path")))
        if file.is_absolute() or ".." in file.parts or not file.name:
            raise ValueError(f"the file {str(file)!r} is outside the directory")
        offset = index.get("offset")
        key = _text(index.get("fqn")), None if offset is None else _extents(offset)
        found[key] = Place(str(file), _natural(info.get("offset")), _natural(info.get("length")))
    return found


def _boxes(tensor: StandIn) -> list[Box]:
    shape = _extents(tensor.get("size"))
    boxes = []
    for chunk in tensor.get("chunks"):
        box = Box(_extents(chunk.get("offsets")), _extents(chunk.get("sizes")))
        if not len(shape) == len(box.offset) == len(box.shape):
            raise ValueError("a chunk has other dims than its tensor")
        if any(o + n > e for o, n, e in zip(box.offset, box.shape, shape, strict=True)):
            raise ValueError("a chunk leaves its tensor")
        if box.size or 0 in shape:
            boxes.append(box)
    return boxes


def _spec(name: str, tensor: StandIn) -> TensorSpec:
    properties = tensor.get("properties")
    dtype = properties.state[0] if isinstance(properties.state, tuple) else properties.get("dtype")
    if dtype not in DTYPE_NAMES:
        raise LayoutError(f"tensor {name!r}: dtype {dtype} cannot be kept in a checkpoint")
    return TensorSpec(name, DTYPE_NAMES[dtype], _extents(tensor.get("size")))


def _paths(found: Any) -> dict[str, tuple[str | int, ...]]:
    """Where names nest; of planner data in another form, nothing."""
    if found is None:
        return {}
    for name, path in _mapping(found).items():
        _text(name)
        if not isinstance(path, tuple) or not all(type(p) in (str, int) for p in path):
            raise ValueError("its planner data are not those of DCP's default planner")
    return dict(found)


def _mapping(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{type(value).__name__} instead of a mapping")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} instead of text")
    value.encode()
    return value


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**60:
        raise ValueError("a size or offset is no natural number")
    return value


def _extents(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or len(value) > 32:
        raise ValueError("a shape is none")
    return tuple(map(_natural, value))
