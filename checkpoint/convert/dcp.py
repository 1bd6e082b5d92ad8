"""Import of what plain ``dcp.save`` wrote, and export to what plain ``dcp.load`` reads.

Both go chunk by chunk: an import has one chunk of the source in memory (a rank's shard of one
tensor), an export one piece of at most ``piece_bytes``. Tensors keep their names and, in an import,
the boxes that they are stored as; each file of the source becomes a pack or more. Objects that are
plain become JSON, the others stay the bytes that DCP pickled (see ``views.dcp_contents``).
"""

import io
import math
import os
import pickle
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import (
    CURRENT_DCP_VERSION,
    DEFAULT_SUFFIX,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.convert.dcp_source import METADATA, DcpSource, check_stored
from everstep.checkpoint.direct_io import make_directory, sync_directory, write_durable
from everstep.checkpoint.errors import CheckpointError
from everstep.checkpoint.layout import Fragment, TensorSpec
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.lock import DirectoryLock
from everstep.checkpoint.manifest import Part, build_manifest
from everstep.checkpoint.pack import PackPlan, PackRecord, StridedBytes, plan_pack, write_pack
from everstep.checkpoint.pieces import pieces
from everstep.checkpoint.plain_json import Json
from everstep.checkpoint.producer import producer
from everstep.checkpoint.step_reader import StepReader
from everstep.checkpoint.torch_layout import DTYPES, strided_bytes
from everstep.checkpoint.views.dcp_contents import contents_of, dcp_objects, plain_form, spread
from everstep.checkpoint.views.dcp_reader import dcp_metadata, object_bytes

PIECE_BYTES = 64 * 2**20
PLAIN_PICKLE_BYTES = 2**22
"""Larger objects of a source are not looked into: they would not go to the manifest."""
FILE_BYTES = 2**32
"""An export begins another file after this many bytes."""


def import_dcp(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    step: int = 0,
    rename: Callable[[str], str] | None = None,
    threads: int = 1,
    on_bytes: Callable[[int], None] | None = None,
) -> StepId:
    """Make a checkpoint directory of a directory that plain ``dcp.save`` wrote.

    Args:
        source: the directory with ``.metadata``.
        target: a checkpoint directory without checkpoints; made when it is not there.
        step: number of the step that is made.
        rename: gives each tensor and object its new name.
        threads: copy threads.
        on_bytes: called with the number of bytes taken over so far.

    Raises:
        DcpFormatError: the source is not what DCP writes; nothing is kept of it.
        LayoutError: the source does not hold each tensor exactly once, or a dtype cannot be kept.
        CheckpointError: ``target`` holds checkpoints, or two names become one.
        DirectoryInUseError: another job writes to ``target``.
        OSError: as the file system reports it; nothing is kept.
    """
    opened = DcpSource(source)
    names = _renamed(opened, rename or str)
    plain, raw = _objects(opened, names)
    sources, plans = _plan(opened, names, raw)
    context = {
        "mesh": {"rank": len(plans)},
        "producer": producer(torch=torch.__version__, imported_from="torch DCP"),
        "objects": dcp_objects(
            {names[name]: value for name, value in plain.items()},
            [names[name] for name in raw],
            {
                new: opened.paths.get(name, (name,)) if new == name else (new,)
                for name, new in names.items()
            },
        ),
    }
    _check_coverage(plans, context)
    directory = CheckpointDirectory(Path(target))
    with DirectoryLock(directory.root):
        if directory.committed():
            raise CheckpointError(
                f"{directory.root} holds checkpoints already: import into another directory"
            )
        directory.collect_garbage()
        generation = directory.create_generation(None, {"rank": len(plans)}).number
        step_id = StepId(generation, step)
        path = directory.begin_step(step_id)
        try:
            done = 0
            for plan in plans:
                record = write_pack(
                    path / f"rank-{plan.rank:05d}-{os.urandom(4).hex()}.safetensors",
                    plan,
                    lambda fragment: _bytes_of(opened, fragment, sources[fragment], raw),
                    threads=threads,
                    on_bytes=_after(done, on_bytes),
                )
                directory.put_part(_part(step_id, plan, record, len(plans), context))
                done += plan.data_bytes
            directory.commit(step_id, len(plans))
        except BaseException:
            directory.delete(step_id)
            raise
    return step_id


def export_dcp(
    reader: StepReader,
    target: str | os.PathLike[str],
    *,
    piece_bytes: int = PIECE_BYTES,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Write a checkpoint as a directory that plain ``dcp.load`` reads.

    Args:
        reader: the checkpoint.
        target: a directory that is empty or not there.
        piece_bytes: most of a tensor that is in memory, and a chunk of it in the export.
        on_bytes: called with the number of bytes of tensors written so far.

    Raises:
        CheckpointError: there is something at ``target``.
        DamagedError: a pack is not what the manifest says; nothing is kept of the export.
        OSError: as the file system reports it; nothing is kept.
    """
    folder = Path(target)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is not empty: export to another directory")
    make_directory(folder)
    contents = contents_of(reader.manifest, reader.where)
    described = dcp_metadata(contents)
    try:
        with _Files(folder) as files:
            for name, spec in contents.tensors.items():
                chunks: list[ChunkStorageMetadata] = []
                boxes = pieces(spec.whole, max(1, piece_bytes // spec.item_bytes))
                for box in boxes if spec.size_bytes else [spec.whole]:
                    tensor = torch.empty(box.shape, dtype=DTYPES[spec.dtype])
                    reader.fill(name, box, strided_bytes(tensor))
                    files.add(MetadataIndex(name, box.offset, len(chunks)), tensor)
                    chunks.append(ChunkStorageMetadata(torch.Size(box.offset), tensor.shape))
                    if on_bytes is not None:
                        on_bytes(files.tensor_bytes)
                stored = described.state_dict_metadata[name]
                assert isinstance(stored, TensorStorageMetadata)
                stored.chunks = chunks
            for name in (*contents.plain, *contents.raw):
                files.add(MetadataIndex(name), object_bytes(reader, contents, name))
        described.storage_data = files.places
        described.storage_meta = StorageMeta()
        described.version = CURRENT_DCP_VERSION
        write_durable(folder / f"{METADATA}.tmp", pickle.dumps(described))
        sync_directory(folder)
        (folder / f"{METADATA}.tmp").rename(folder / METADATA)
        sync_directory(folder)
    except BaseException:
        for file in folder.iterdir():
            file.unlink()
        raise


class _Files:
    """The files of an export, one after the other; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stream: io.BufferedWriter | None = None
        self._count = 0
        self.places: dict[MetadataIndex, _StorageInfo] = {}
        self.tensor_bytes = 0

    def add(self, index: MetadataIndex, value: torch.Tensor | bytes) -> None:
        """Append a tensor, or the bytes of an object."""
        if self._stream is None or self._stream.tell() >= FILE_BYTES:
            self._end()
            self._stream = (self._folder / self._name()).open("xb")
        begin = self._stream.tell()
        if isinstance(value, bytes):
            self._stream.write(value)
        else:
            torch.save(value, self._stream)
            self.tensor_bytes += math.prod(value.shape) * value.element_size()
        end = self._stream.tell()
        self.places[index] = _StorageInfo(self._name(), begin, end - begin)

    def _name(self) -> str:
        return f"__0_{self._count}{DEFAULT_SUFFIX}"

    def _end(self) -> None:
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._stream = None
            self._count += 1

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self._end()
        elif self._stream is not None:
            self._stream.close()


def _renamed(source: DcpSource, rename: Callable[[str], str]) -> dict[str, str]:
    names = {name: rename(name) for name in (*source.tensors, *source.objects)}
    taken: dict[str, str] = {}
    for name, new in names.items():
        if taken.setdefault(new, name) != name:
            raise CheckpointError(
                f"{taken[new]!r} and {name!r} would both be named {new!r}: give each a name of its "
                "own"
            )
    return names


def _objects(source: DcpSource, names: Mapping[str, str]) -> tuple[dict[str, Json], set[str]]:
    """Objects as JSON where they are plain, and the others' names; by the source's names."""
    plain: dict[str, Json] = {}
    raw: set[str] = set()
    for name, place in source.objects.items():
        form = None
        if place.length_bytes <= PLAIN_PICKLE_BYTES:
            stream = io.BytesIO(source.object_bytes(name))
            try:
                check_stored(stream)
                form = plain_form(torch.load(stream, weights_only=True), names[name])
            except Exception:  # not plain, or no pickle at all: kept as it is, never trusted
                form = None
        if form is None:
            raw.add(name)
        else:
            plain[name] = form[0]
    return plain, raw


def _plan(
    source: DcpSource, names: Mapping[str, str], raw: Set[str]
) -> tuple[dict[Fragment, str], list[PackPlan]]:
    """For each fragment the name in the source, and the packs: usually one for each file."""
    found: dict[Fragment, str] = {}
    by_file: dict[str, list[Fragment]] = {}
    for name, spec in source.tensors.items():
        new = TensorSpec(names[name], spec.dtype, spec.shape)
        for box, place in source.chunks[name].items():
            fragment = Fragment(new, box)
            if not spec.size_bytes:
                fragment = Fragment(new, new.whole)
            if fragment not in found:
                found[fragment] = name
                by_file.setdefault(place.file, []).append(fragment)
    for name in sorted(raw):
        place = source.objects[name]
        spec = TensorSpec(names[name], "U8", (place.length_bytes,))
        found[Fragment(spec, spec.whole)] = name
        by_file.setdefault(place.file, []).append(Fragment(spec, spec.whole))
    packs = [pack for file in sorted(by_file) for pack in spread(by_file[file])] or [[]]
    return found, [plan_pack(rank, fragments) for rank, fragments in enumerate(packs)]


def _check_coverage(plans: Sequence[PackPlan], context: dict[str, Any]) -> None:
    """The manifest that is to be, before anything is written; raises LayoutError."""
    parts = [
        _part(
            StepId(0, 0),
            plan,
            PackRecord(
                file=f"{plan.rank}",
                rank=plan.rank,
                size_bytes=plan.size_bytes,
                data_start=len(plan.header),
                data_bytes=plan.data_bytes,
                crc32c=0,
            ),
            len(plans),
            context,
        )
        for plan in plans
    ]
    build_manifest(parts)


def _part(
    step_id: StepId, plan: PackPlan, record: PackRecord, count: int, context: dict[str, Any]
) -> Part:
    return Part(
        generation=step_id.generation,
        step=step_id.step,
        rank=plan.rank,
        world_size=count,
        pack=record,
        fragments=plan.fragments,
        context=context if plan.rank == 0 else {},
    )


def _bytes_of(source: DcpSource, fragment: Fragment, name: str, raw: Set[str]) -> StridedBytes:
    if name in raw:
        data = np.frombuffer(source.object_bytes(name), np.uint8)
        return StridedBytes(data, 0, (1,))
    return strided_bytes(source.chunk(name, fragment.box))


def _after(done: int, on_bytes: Callable[[int], None] | None) -> Callable[[int], None] | None:
    return None if on_bytes is None else lambda count: on_bytes(done + count)
