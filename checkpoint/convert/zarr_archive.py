"""A step as a plain Zarr v3 archive: sharded, compressed, with checksums, written by TensorStore.

One group with one array per tensor, named like it. Arrays that are larger than a chunk keep many
chunks in one file (``sharding_indexed``); every chunk is compressed (zstd) and has a CRC-32C. Types
beyond the core of Zarr (BF16, FP8, C32) are unsigned numbers of the same bits; the attribute
``everstep_dtype`` of each array tells the true type. A missing chunk of numbers reads as NaN.
"""

import json
import math
import os
import re
from collections import deque
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from everstep.checkpoint.convert.atomic import (
    DEFAULT_BUDGET_BYTES,
    ByteCount,
    OnBytes,
    block_bytes,
    new_target,
)
from everstep.checkpoint.convert.errors import ConversionError
from everstep.checkpoint.convert.plain import What, selected
from everstep.checkpoint.convert.source import Source, read_box
from everstep.checkpoint.convert.step_source import StepSource
from everstep.checkpoint.direct_io import write_durable
from everstep.checkpoint.layout import Box, TensorSpec
from everstep.checkpoint.step_reader import StepReader
from everstep.checkpoint.views.zarr_metadata import CORE_TYPES, zarr_type

DEFAULT_LEVEL = 3
CHUNK_BYTES = 2**20
_IN_FLIGHT = 2
"""Shards that are compressed and written while the next one is read."""
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")


def export_zarr(
    reader: StepReader,
    target: Path,
    *,
    what: What = "everything",
    dtype: str | None = None,
    level: int = DEFAULT_LEVEL,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    on_bytes: OnBytes | None = None,
) -> int:
    """Write a step as a Zarr v3 group; returns the bytes of its tensors, uncompressed.

    Args:
        reader: of the step.
        target: the folder; it appears whole, or not at all.
        what: which tensors.
        dtype: of all floating-point tensors; None: as they are stored.
        level: of zstd, 1 to 22.
        budget_bytes: memory to use.
        on_bytes: progress.

    Raises:
        ConversionError: a tensor's name cannot be that of a folder.
        TargetExistsError: the target is taken.
        DamagedError: a pack is not what the manifest says.
    """
    source, written = selected(reader, what, dtype), ByteCount(on_bytes)
    problems = [p for name in source.tensors if (p := _problem(name)) is not None]
    if problems:
        raise ConversionError(StepSource(reader).where, problems)
    shard_bytes = block_bytes(budget_bytes) // 2  # TensorStore has copies of those in flight
    manifest = reader.manifest
    attributes = {"step": manifest.step, "producer": dict(manifest.producer)}
    group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    with new_target(target) as folder:
        folder.mkdir()
        for tensor in source.tensors.values():
            _write_array(folder, source, tensor, level, shard_bytes, written)
        write_durable(folder / "zarr.json", json.dumps(group).encode())
    return written.total


def chunk_shapes(tensor: TensorSpec, shard_bytes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of a chunk, and of the shard that holds a whole number of chunks (pure).

    Both are contiguous in C order, but for a rest at an edge. They are the same where the tensor is
    no larger than a chunk.
    """
    chunk = [1] * len(tensor.shape)
    items = max(1, min(CHUNK_BYTES, shard_bytes) // tensor.item_bytes)
    split = 0
    for dim in reversed(range(len(tensor.shape))):
        split = dim
        chunk[dim] = max(1, min(items, tensor.shape[dim]))
        items //= chunk[dim]
        if chunk[dim] < tensor.shape[dim]:
            break
    shard = list(chunk)
    if tensor.shape:
        fitting = max(1, shard_bytes // (math.prod(chunk) * tensor.item_bytes))
        shard[split] *= max(1, min(fitting, -(-tensor.shape[split] // chunk[split])))
    return tuple(chunk), tuple(shard)


def _write_array(
    folder: Path,
    source: Source,
    tensor: TensorSpec,
    level: int,
    shard_bytes: int,
    written: ByteCount,
) -> None:
    chunk, shard = chunk_shapes(tensor, shard_bytes)
    array = tensorstore.open(_array_spec(folder, tensor, chunk, shard, level)).result()
    numbers = np.dtype(zarr_type(tensor.dtype, CORE_TYPES).name)
    pending: deque[Any] = deque()
    try:
        for box in _tiles(tensor.shape, shard):
            if len(pending) == _IN_FLIGHT:
                _wait_for_first(pending)
            data = read_box(source, tensor.name, box)
            place = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
            pending.append(array[place].write(data.view(numbers).reshape(box.shape)))
            written.add(len(data))
        while pending:
            _wait_for_first(pending)
    except BaseException:  # Ctrl-C, too: what is in flight would go on in a folder that is deleted
        for write in pending:
            write.exception()
        raise


def _wait_for_first(pending: deque[Any]) -> None:
    """Raises OSError for what the file system refuses; TensorStore tells it in a ValueError."""
    try:
        pending[0].result()
    except ValueError as error:
        if (found := _OS_ERROR.search(str(error))) is None:
            raise
        code = int(found[1])
        raise OSError(code, os.strerror(code)) from error
    pending.popleft()


def _array_spec(
    folder: Path, tensor: TensorSpec, chunk: tuple[int, ...], shard: tuple[int, ...], level: int
) -> dict[str, Any]:
    to_bytes = {"name": "bytes", "configuration": {"endian": "little"}}
    zstd = {"name": "zstd", "configuration": {"level": level, "checksum": False}}
    codecs: list[Any] = [to_bytes, zstd, {"name": "crc32c"}]
    if shard != chunk:
        configuration = {
            "chunk_shape": chunk,
            "codecs": codecs,
            "index_codecs": [to_bytes, {"name": "crc32c"}],
            "index_location": "end",
        }
        codecs = [{"name": "sharding_indexed", "configuration": configuration}]
    kind = zarr_type(tensor.dtype, CORE_TYPES)
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{folder.absolute() / tensor.name}/"},
        "metadata": {
            "shape": tensor.shape,
            "data_type": kind.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
            "codecs": codecs,
            "fill_value": kind.fill,
            "attributes": {"everstep_dtype": tensor.dtype},
        },
        "store_data_equal_to_fill_value": True,
        "create": True,
    }


def _tiles(shape: tuple[int, ...], tile: tuple[int, ...]) -> Iterator[Box]:
    """The boxes of a regular grid, cut at the edges."""
    for offset in product(*(range(0, n, t) for n, t in zip(shape, tile, strict=True))):
        rest = (min(t, n - o) for o, n, t in zip(offset, shape, tile, strict=True))
        yield Box(offset, tuple(rest))


def _problem(name: str) -> str | None:
    if not name or name in (".", "..", "zarr.json") or "/" in name or "\0" in name:
        return f"{name!r} cannot be the name of a folder"
    return None
