"""Writing tensors of a source as one safetensors file, or as a folder of several with an index."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from everstep.checkpoint.convert.atomic import ByteCount, block_bytes
from everstep.checkpoint.convert.safetensors_source import INDEX_NAME
from everstep.checkpoint.convert.source import Source, read_box
from everstep.checkpoint.direct_io import StreamWriter, write_durable
from everstep.checkpoint.layout import TensorSpec
from everstep.checkpoint.pack import STORED_AS
from everstep.checkpoint.pieces import pieces

METADATA = {"format": "pt"}
"""What transformers asks for: tensors in the layout of torch."""


def plan_shards(tensors: Iterable[TensorSpec], most_bytes: int) -> list[list[TensorSpec]]:
    """Tensors in order, as runs of at most ``most_bytes``; a larger tensor is alone."""
    shards: list[list[TensorSpec]] = [[]]
    size_bytes = 0
    for tensor in tensors:
        if shards[-1] and size_bytes + tensor.size_bytes > most_bytes:
            shards.append([])
            size_bytes = 0
        shards[-1].append(tensor)
        size_bytes += tensor.size_bytes
    return shards


def write_file(
    path: Path,
    source: Source,
    tensors: Iterable[TensorSpec],
    *,
    budget_bytes: int,
    written: ByteCount,
) -> None:
    """Write one durable file, tensor by tensor, largest items first, so that all are aligned.

    Raises:
        FileExistsError: the path exists already.
        OSError: as the file system reports it.
    """
    ordered = sorted(tensors, key=lambda t: (-t.item_bytes, t.name))
    most_bytes = block_bytes(budget_bytes)
    with StreamWriter(path, staging_bytes=most_bytes, buffers=2) as out:
        out.append(_header(ordered))
        for tensor in ordered:
            for box in pieces(tensor.whole, most_bytes // tensor.item_bytes):
                data = read_box(source, tensor.name, box)
                out.append(data)
                written.add(len(data))
        out.finish()


def write_shards(
    folder: Path,
    source: Source,
    shards: Sequence[Sequence[TensorSpec]],
    *,
    budget_bytes: int,
    written: ByteCount,
) -> None:
    """Write ``model-00001-of-0000N.safetensors``, ... and their index into an existing folder.

    A single shard is ``model.safetensors`` without an index, as transformers writes it.
    """
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, tensors in zip(names, shards, strict=True):
        write_file(folder / name, source, tensors, budget_bytes=budget_bytes, written=written)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(t.size_bytes for shard in shards for t in shard)},
            "weight_map": {
                t.name: name for name, shard in zip(names, shards, strict=True) for t in shard
            },
        }
        write_durable(folder / INDEX_NAME, json.dumps(index, indent=2).encode())


def _header(ordered: Sequence[TensorSpec]) -> bytes:
    entries: dict[str, object] = {"__metadata__": METADATA}
    position = 0
    for tensor in ordered:
        end = position + tensor.size_bytes
        dtype, more_dims = STORED_AS.get(tensor.dtype, (tensor.dtype, ()))
        entries[tensor.name] = {
            "dtype": dtype,
            "shape": [*tensor.shape, *more_dims],
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    padded = -(-len(text) // 8) * 8
    return padded.to_bytes(8, "little") + text.ljust(padded)
