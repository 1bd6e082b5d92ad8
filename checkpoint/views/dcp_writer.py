"""The writing half of the storage for torch DCP: one pack per rank, committed by the coordinator.

Every rank writes one pack, even an empty one (more where it has several boxes of one tensor), to
``incoming``; where it writes does not depend on the plan, since a planner that caches its plans
keeps what storage has put into them. What a rank has written travels with DCP's own exchange to the
coordinator, which makes the manifest of it.
"""

import io
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from torch.distributed.checkpoint import storage
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from everstep.checkpoint.direct_io import make_directory
from everstep.checkpoint.errors import CheckpointError, LayoutError
from everstep.checkpoint.layout import Box, Fragment, TensorSpec
from everstep.checkpoint.manifest import Part
from everstep.checkpoint.pack import PackRecord, StridedBytes, plan_pack, write_pack
from everstep.checkpoint.plain_json import Json
from everstep.checkpoint.producer import producer
from everstep.checkpoint.torch_layout import DTYPE_NAMES, live_tensor, strided_bytes
from everstep.checkpoint.views import dcp_versions
from everstep.checkpoint.views.dcp_contents import dcp_objects, plain_form, spread
from everstep.checkpoint.views.dcp_planner import check_write
from everstep.checkpoint.views.dcp_versions import local_path


@dataclass(frozen=True, kw_only=True)
class _Written:
    """What one rank tells the coordinator."""

    packs: tuple[tuple[PackRecord, tuple[Fragment, ...]], ...]
    plain: Mapping[str, Json]
    raw: tuple[str, ...]


class StorageWriter(storage.StorageWriter):
    """Saves to a local or shared directory; give one to ``dcp.save`` or ``dcp.async_save``.

    Args:
        path: the checkpoint; ``checkpoint_id`` of ``dcp.save`` replaces it. A directory, made when
            it is not there, that holds nothing or what a StorageWriter has saved.
        threads: copy threads of this rank.

    ``dcp.save`` raises DCP's CheckpointException with the error of each rank that failed; the path
    keeps the checkpoint that it had:
        CheckpointError: the path holds a run's checkpoints, or those of another writer of DCP.
        SupersededError: a later save to the path has begun.
        LayoutError: the items of the plan do not hold each tensor exactly once, or are not what the
            planner said; or the dtype cannot be saved.
        StateError: the planner left planner data that are not plain.
        OSError: as the file system reports it.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int = 1) -> None:
        super().__init__()
        self._path = local_path(path)
        self._threads = threads
        self._rank = 0

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The path."""
        return self._path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a path of the local file system."""
        return "://" not in os.fspath(checkpoint_id)

    def storage_meta(self) -> StorageMeta:
        """What planners are told: the path."""
        return StorageMeta(checkpoint_id=self._path, save_id=uuid.uuid4().hex)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Take over the path that a save names."""
        if checkpoint_id is not None:
            self._path = local_path(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Take over the number of this rank.

        Raises:
            CheckpointError: the save is to be done without collectives.
        """
        if not kwargs.get("use_collectives", True):
            raise CheckpointError(
                "use_collectives=False makes one checkpoint per rank, which this format has not: "
                "leave it True, or pass no_dist=True for a single process"
            )
        self._rank = int(kwargs.get("rank") or 0)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing to add: where a rank writes does not depend on the plan."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the path ready, before any rank writes."""
        dcp_versions.begin(self._path)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the pack of this rank, durably; returns when it is written."""
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write(plan, planner))
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit what all ranks have written, then delete what it replaces."""
        written: list[_Written] = [found[-1].storage_data for found in results]
        plain = {name: value for rank in written for name, value in rank.plain.items()}
        raw = [name for rank in written for name in rank.raw]
        context = {
            "mesh": {"rank": len(written)},
            "producer": producer(torch=torch.__version__),
            "objects": dcp_objects(plain, raw, metadata.planner_data),
        }
        packs = [pack for rank in written for pack in rank.packs]
        parts = [
            Part(
                generation=0,
                step=0,
                rank=number,
                world_size=len(packs),
                pack=record,
                fragments=fragments,
                context={} if number else context,
            )
            for number, (record, fragments) in enumerate(packs)
        ]
        dcp_versions.commit(self._path, parts)

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        sources: dict[Fragment, WriteItem | StridedBytes] = {}
        plain: dict[str, Json] = {}
        raw: list[str] = []
        results = []
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                size_bytes = self._take_bytes(item, planner, sources, plain, raw)
            else:
                check_write(planner, item)
                fragment = _fragment(item)
                size_bytes = fragment.size_bytes
                if fragment.box.size or not fragment.spec.size_bytes:
                    sources[fragment] = item
            results.append(WriteResult(item.index, size_bytes, None))
        folder = self._path / dcp_versions.INCOMING
        make_directory(folder)
        packs = []
        for fragments in spread(sources):
            pack = plan_pack(self._rank, fragments)
            record = write_pack(
                folder / f"rank-{self._rank:05d}-{os.urandom(4).hex()}.safetensors",
                pack,
                lambda fragment: _source(fragment, sources[fragment], planner),
                threads=self._threads,
            )
            packs.append((record, pack.fragments))
        told = _Written(packs=tuple(packs), plain=plain, raw=tuple(raw))
        return [*results, WriteResult(MetadataIndex(""), 0, told)]

    def _take_bytes(
        self,
        item: WriteItem,
        planner: SavePlanner,
        sources: dict[Fragment, WriteItem | StridedBytes],
        plain: dict[str, Json],
        raw: list[str],
    ) -> int:
        """Note an object down: as JSON where DCP would only pickle it; the number of its bytes."""
        name = item.index.fqn
        if _only_pickles(planner):
            form = plain_form(planner.lookup_object(item.index), name)
            if form is not None:
                plain[name] = form[0]
                return 0
        data = planner.resolve_data(item)
        if not isinstance(data, io.BytesIO):
            raise LayoutError(
                f"the planner gives a {type(data).__name__} for the bytes of {name!r}"
            )
        content = np.frombuffer(data.getvalue(), np.uint8)
        spec = TensorSpec(name, "U8", (len(content),))
        sources[Fragment(spec, spec.whole)] = StridedBytes(content, 0, (1,))
        raw.append(name)
        return len(content)


def _fragment(item: WriteItem) -> Fragment:
    assert item.tensor_data is not None
    dtype, chunk = item.tensor_data.properties.dtype, item.tensor_data.chunk
    if dtype not in DTYPE_NAMES:
        raise LayoutError(f"tensor {item.index.fqn!r}: dtype {dtype} cannot be saved")
    spec = TensorSpec(item.index.fqn, DTYPE_NAMES[dtype], tuple(item.tensor_data.size))
    return Fragment(spec, Box(tuple(chunk.offsets), tuple(chunk.sizes)))


def _source(
    fragment: Fragment, source: WriteItem | StridedBytes, planner: SavePlanner
) -> StridedBytes:
    """The bytes of a fragment, resolved when they are to be written."""
    if isinstance(source, StridedBytes):
        return source
    data = planner.resolve_data(source)
    name = fragment.spec.name
    if not isinstance(data, torch.Tensor):
        raise LayoutError(f"the planner gives a {type(data).__name__} for the tensor {name!r}")
    local = live_tensor(name, data.detach().resolve_conj().resolve_neg()).local
    found = DTYPE_NAMES[local.dtype], tuple(local.shape)
    if found != (fragment.spec.dtype, fragment.box.shape):
        raise LayoutError(
            f"the planner gives {found[0]} {list(found[1])} for a part of {name!r} that it planned "
            f"as {fragment.spec.dtype} {list(fragment.box.shape)}: set dtype and sizes of "
            "tensor_data in create_local_plan"
        )
    return strided_bytes(local.cpu())


def _only_pickles(planner: SavePlanner) -> TypeGuard[DefaultSavePlanner]:
    """Whether a planner gives for an object what ``torch.save`` makes of it, and nothing else."""
    default = DefaultSavePlanner
    return (
        isinstance(planner, default)
        and type(planner).resolve_data is default.resolve_data
        and type(planner).transform_object is default.transform_object
    )
