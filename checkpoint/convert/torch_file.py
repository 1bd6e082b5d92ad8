"""A step as one ``torch.save`` file of plain tensors, written with bounded memory.

torch pickles the tensors' shapes once, of tensors that have no memory; the archive around that (a
zip without compression, one entry per storage) is written here, entry by entry. ``torch.load``
reads it with ``weights_only=True``, mapped or not.
"""

import os
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from everstep.checkpoint.convert.atomic import (
    DEFAULT_BUDGET_BYTES,
    ByteCount,
    OnBytes,
    block_bytes,
    new_target,
)
from everstep.checkpoint.convert.plain import What, selected
from everstep.checkpoint.convert.source import Source, read_box
from everstep.checkpoint.layout import TensorSpec
from everstep.checkpoint.pieces import pieces
from everstep.checkpoint.step_reader import StepReader
from everstep.checkpoint.torch_layout import DTYPES

_ALIGN_BYTES = 64
_HEADER_BYTES = 30 + 20
"""Of a zip entry without its name, with its sizes as 64-bit numbers."""
_PADDING_ID, _PADDING_BYTES = 0x4246, 4
"""The extra field that torch pads its entries with, too, and its size without padding."""
_DATE = (1980, 1, 1, 0, 0, 0)


def export_torch(
    reader: StepReader,
    target: Path,
    *,
    what: What = "model",
    dtype: str | None = None,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    on_bytes: OnBytes | None = None,
) -> int:
    """Write a step as a state dict for ``torch.load(target, weights_only=True)``.

    Arguments, result and errors are those of ``plain.export_safetensors``.
    """
    source, written = selected(reader, what, dtype), ByteCount(on_bytes)
    tensors = list(source.tensors.values())
    most_bytes = block_bytes(budget_bytes)
    with new_target(target) as path, path.open("xb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, content in _entries(tensors, path.with_suffix(".empty")):
                if content is not None:
                    archive.writestr(zipfile.ZipInfo(name, _DATE), content)
                    continue
                tensor = tensors[int(name.rpartition("/")[2])]
                _write_storage(archive, name, source, tensor, most_bytes, written)
        file.flush()
        os.fsync(file.fileno())
    return written.total


def _entries(tensors: Sequence[TensorSpec], temporary: Path) -> list[tuple[str, bytes | None]]:
    """Names and contents of the archive, in torch's own order; None for tensors, by their number.

    torch writes a sparse file of what has no memory; it is read back and deleted.
    """
    try:
        with FakeTensorMode():
            empty = {t.name: torch.empty(t.shape, dtype=DTYPES[t.dtype]) for t in tensors}
            with torch.serialization.skip_data(materialize_fake_tensors=True):
                torch.save(empty, temporary)
        with zipfile.ZipFile(temporary) as archive:
            found = [(name, name.partition("/")[2]) for name in archive.namelist()]
            return [
                (f"archive/{short}", None if short.startswith("data/") else archive.read(name))
                for name, short in found
            ]
    finally:
        temporary.unlink(missing_ok=True)


def _write_storage(
    archive: zipfile.ZipFile,
    name: str,
    source: Source,
    tensor: TensorSpec,
    most_bytes: int,
    written: ByteCount,
) -> None:
    """One entry with the bytes of a tensor, aligned so that it can be mapped."""
    info = zipfile.ZipInfo(name, _DATE)
    info.file_size = tensor.size_bytes
    begin = archive.start_dir + _HEADER_BYTES + len(name) + _PADDING_BYTES
    padding = -begin % _ALIGN_BYTES
    info.extra = struct.pack("<HH", _PADDING_ID, padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=True) as entry:
        for box in pieces(tensor.whole, most_bytes // tensor.item_bytes):
            data = read_box(source, tensor.name, box)
            entry.write(data.data)
            written.add(len(data))
