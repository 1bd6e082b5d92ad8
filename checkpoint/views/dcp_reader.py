"""The reading half of the storage for torch DCP."""

import io
import os
import uuid
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint import storage
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from everstep.checkpoint.errors import CheckpointError, LayoutError
from everstep.checkpoint.layout import Box
from everstep.checkpoint.pieces import pieces
from everstep.checkpoint.step_reader import StepReader
from everstep.checkpoint.torch_layout import DTYPES, strided_bytes
from everstep.checkpoint.views import dcp_versions
from everstep.checkpoint.views.dcp_contents import Contents, contents_of, plain_value
from everstep.checkpoint.views.dcp_planner import check_read
from everstep.checkpoint.views.dcp_versions import local_path

STAGING_BYTES = 16 * 2**20
"""Most that is read beside the destination: on its way to a device or to another dtype."""


class StorageReader(storage.StorageReader):
    """Loads what a StorageWriter saved, or a step of a run; give one to ``dcp.load``.

    Every tensor is one chunk to DCP, however it is stored: any box of it can be read, so that DCP
    has nothing to plan but what each rank wants. Every block that is read is verified.

    Args:
        path: the checkpoint, or the checkpoint directory of a run; ``checkpoint_id`` of
            ``dcp.load`` replaces it.
        step: which step of a run; None: the newest.
        threads: copy threads of this rank.

    From ``read_metadata`` until the data are read, a save to the same path keeps the version that
    this reader has found.

    ``dcp.load`` raises DCP's CheckpointException with the error of each rank that failed:
        CheckpointError: there is no checkpoint, or it was replaced while ranks began to read.
        DamagedError: a pack or the manifest is not what was written.
        LayoutError: a DTensor's shard is not where DCP's planner thinks.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, step: int | None = None, threads: int = 1
    ) -> None:
        super().__init__()
        self._path = local_path(path)
        self._step, self._threads = step, threads
        self._held: dcp_versions.HeldVersion | None = None

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The path."""
        return self._path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a path of the local file system."""
        return "://" not in os.fspath(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Let go of what was read, and take over the path that a load names."""
        self._let_go()
        if checkpoint_id is not None:
            self._path = local_path(checkpoint_id)

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """What the checkpoint holds, as DCP describes it; holds this version of it."""
        self._let_go()
        self._held = dcp_versions.hold(self._path, self._step)
        found = contents_of(self._held.manifest, self._held.path)
        described = dcp_metadata(found)
        described.storage_meta = StorageMeta(checkpoint_id=self._path, load_id=uuid.uuid4().hex)
        return described

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **options: Any
    ) -> None:
        """Nothing to set up: ``read_metadata`` has opened the checkpoint on this rank."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Tell the coordinator which version this rank reads."""
        return replace(plan, storage_data=tuple(self._version().step_id))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Refuse to load parts of two versions."""
        versions = {plan.storage_data for plan in plans if plan.storage_data is not None}
        if len(versions) > 1:
            raise CheckpointError(
                f"{self._path} was replaced while ranks began to read it: load again; do not save "
                "to a path that is being loaded"
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read everything that the plan asks for, then let go of the checkpoint."""
        held = self._version()
        contents = contents_of(held.manifest, held.path)
        checked: set[str] = set()
        with StepReader(held.path, held.manifest, threads=self._threads) as reader:
            for item in plan.items:
                if item.type == LoadItemType.BYTE_IO:
                    data = object_bytes(reader, contents, item.storage_index.fqn)
                    planner.load_bytes(item, io.BytesIO(data))
                    continue
                if item.dest_index.fqn not in checked:
                    check_read(planner, item.dest_index.fqn)
                    checked.add(item.dest_index.fqn)
                target = planner.resolve_tensor(item).detach()
                _fill(reader, item, target)
                planner.commit_tensor(item, target)
        self._let_go()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _version(self) -> dcp_versions.HeldVersion:
        if self._held is None:
            raise CheckpointError(f"{self._path} is not open: call read_metadata first")
        return self._held

    def _let_go(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None


def dcp_metadata(contents: Contents) -> Metadata:
    """The contents of a checkpoint as DCP describes them, each tensor being one chunk."""
    described: dict[str, Any] = {
        name: TensorStorageMetadata(
            TensorProperties(dtype=DTYPES[spec.dtype]),
            torch.Size(spec.shape),
            [ChunkStorageMetadata(torch.Size(spec.whole.offset), torch.Size(spec.shape))],
        )
        for name, spec in contents.tensors.items()
    }
    described |= {name: BytesStorageMetadata() for name in (*contents.plain, *contents.raw)}
    return Metadata(described, planner_data=contents.paths, storage_data={})


def object_bytes(reader: StepReader, contents: Contents, name: str) -> bytes:
    """An object as DCP's planners expect it: a stream of ``torch.save``.

    Raises:
        DamagedError: it cannot be read.
        KeyError: the checkpoint has no such object.
    """
    if name in contents.raw:
        return reader.read(name).tobytes()
    stream = io.BytesIO()
    torch.save(plain_value(contents, name, reader.where), stream)
    return stream.getvalue()


def _fill(reader: StepReader, item: ReadItem, target: torch.Tensor) -> None:
    """Read a box into a tensor of any device, dtype and strides."""
    name, index = item.storage_index.fqn, item.storage_index.offset or ()
    offset = tuple(a + b for a, b in zip(index, item.storage_offsets, strict=True))
    wanted = Box(offset, tuple(item.lengths))
    if tuple(target.shape) != wanted.shape:
        raise LayoutError(
            f"the planner gives a tensor of shape {list(target.shape)} to read {wanted.shape} of "
            f"{name!r} into"
        )
    spec = reader.manifest.tensors[name].spec
    dtype = DTYPES[spec.dtype]
    if target.device.type == "cpu" and target.dtype == dtype:
        reader.fill(name, wanted, strided_bytes(target))
        return
    for piece in pieces(wanted, STAGING_BYTES // spec.item_bytes):
        staged = torch.empty(piece.shape, dtype=dtype)
        reader.fill(name, piece, strided_bytes(staged))
        begin = piece.relative_to(wanted)
        part = target[tuple(slice(b, b + n) for b, n in zip(begin, piece.shape, strict=True))]
        part.copy_(staged)
