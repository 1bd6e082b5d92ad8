"""Reads boxes of the tensors of one committed checkpoint out of its packs (no torch).

Packs that are local files are mapped; those of an object store are fetched by ranges; those of
a snapshot in memory are opened by whoever knows where they are.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np

from everstep.checkpoint.collector import collector_paused
from everstep.checkpoint.copy_plan import plan_copies
from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.errors import CheckpointError
from everstep.checkpoint.layout import Box
from everstep.checkpoint.manifest import Manifest
from everstep.checkpoint.pack import PackRecord, StridedBytes, dense_strides
from everstep.checkpoint.pack_reader import PackReader
from everstep.checkpoint.pack_walk import PackCopy
from everstep.checkpoint.ranged_read import RangedReader, Request
from everstep.checkpoint.store import PackFolder


class StepReader:
    """Opens packs when they are first needed, and keeps them open; a context manager.

    Args:
        step: the checkpoint: its local folder, or where else its packs are.
        manifest: its manifest.
        threads: copy threads.
        open_pack: opens packs that are neither files nor have to be fetched.
    """

    def __init__(
        self,
        step: Path | PackFolder,
        manifest: Manifest,
        *,
        threads: int = 1,
        open_pack: Callable[[PackRecord], PackReader] | None = None,
    ) -> None:
        self.manifest = manifest
        self._step = step
        self._threads = threads
        self._open_pack = open_pack
        self._files = ExitStack()
        self._packs: dict[int, PackReader] = {}
        self._ranged: RangedReader | None = None
        if open_pack is None and not isinstance(step, Path) and step.path is None:
            self._ranged = RangedReader(step, manifest, threads=threads)

    @property
    def where(self) -> str:
        """Path or URL of the checkpoint, for people and messages."""
        return str(self._step) if isinstance(self._step, Path) else self._step.where

    @property
    def step_path(self) -> Path:
        """Local folder of the checkpoint; raises CheckpointError where it has none."""
        path = self._step if isinstance(self._step, Path) else self._step.path
        if path is None:
            raise CheckpointError(
                f"{self.where} is not a local folder: this needs one; copy the checkpoint to a "
                "local disk first"
            )
        return path

    @property
    def ranged(self) -> RangedReader | None:
        """What fetches packs by ranges; None where they are local files, or memory."""
        return self._ranged

    def fill(self, name: str, wanted: Box, target: StridedBytes) -> None:
        """Copy a box of a tensor into an array, verifying every block that is touched.

        Args:
            name: logical name of the tensor.
            wanted: the box; an empty one needs no pack.
            target: the array of the box's shape; writable.

        Raises:
            DamagedError: a pack is not what the manifest says; part of the array may be filled.
            KeyError: the checkpoint has no such tensor.
        """
        self.fill_all([Request(name, wanted, target)])

    def fill_all(
        self, requests: Sequence[Request], on_bytes: Callable[[int], None] | None = None
    ) -> None:
        """As ``fill``, for many boxes: every pack is read once, front to back.

        Args:
            requests: what to fill.
            on_bytes: called with the bytes filled so far.
        """
        if self._ranged is not None:
            self._ranged.fill(requests, on_bytes)
            return
        done_bytes = 0

        def told(n_bytes: int) -> None:
            nonlocal done_bytes
            done_bytes += n_bytes
            if on_bytes is not None:
                on_bytes(done_bytes)

        for pack, copies in sorted(self._plan(requests).items()):
            self._pack(pack).read(copies, told)

    def read(self, name: str, box: Box | None = None) -> ByteArray:
        """The bytes of a box of a tensor (None: of all of it), dense, in C order; as ``fill``."""
        spec = self.manifest.tensors[name].spec
        wanted = box or spec.whole
        data = np.empty(math.prod(wanted.shape) * spec.item_bytes, np.uint8)
        self.fill(name, wanted, StridedBytes(data, 0, dense_strides(wanted.shape, spec.item_bytes)))
        return data

    def verify(self, pack: int) -> None:
        """Check every byte of a pack, by its number in the manifest; raises DamagedError."""
        if self._ranged is not None:
            self._ranged.verify(pack)
        else:
            self._pack(pack).verify_all()

    def close(self) -> None:
        """Let go of all packs; may be called twice."""
        self._packs.clear()
        self._files.close()

    def __enter__(self) -> "StepReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @collector_paused()
    def _plan(self, requests: Sequence[Request]) -> dict[int, list[PackCopy]]:
        """The copies out of each pack."""
        found: dict[int, list[PackCopy]] = {}
        for request in requests:
            stored = self.manifest.tensors[request.name]
            starts, item_bytes = self.manifest.starts(request.name), stored.spec.item_bytes
            target = request.target
            for pack, begin, end, strides, target_bytes, shape in plan_copies(
                stored.layout, stored.packs, starts, item_bytes, request.box, target.strides_bytes
            ):
                found.setdefault(pack, []).append(
                    PackCopy(begin, end, strides, shape, item_bytes, target, target_bytes)
                )
        return found

    def _pack(self, number: int) -> PackReader:
        if number not in self._packs:
            opened = (self._open_pack or self._map_pack)(self.manifest.packs[number])
            self._packs[number] = self._files.enter_context(opened)
        return self._packs[number]

    def _map_pack(self, record: PackRecord) -> PackReader:
        return PackReader(self.step_path / record.file, record, threads=self._threads)
