"""Reads boxes of the tensors of one committed checkpoint out of its packs (no torch)."""

import math
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np

from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.layout import Box, Fragment
from everstep.checkpoint.manifest import Manifest
from everstep.checkpoint.pack import PackReader, StridedBytes, dense_strides
from everstep.checkpoint.reshard import plan_load


class StepReader:
    """Opens packs when they are first needed, and keeps them open; a context manager.

    Args:
        step_path: directory of the checkpoint.
        manifest: its manifest.
        threads: copy threads.
    """

    def __init__(self, step_path: Path, manifest: Manifest, *, threads: int = 1) -> None:
        self.step_path, self.manifest = step_path, manifest
        self._threads = threads
        self._files = ExitStack()
        self._packs: dict[int, PackReader] = {}

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
        stored = self.manifest.tensors[name]
        item_bytes = stored.spec.item_bytes
        starts = self.manifest.starts(name)
        for copy in plan_load(stored.layout, stored.packs, starts, item_bytes, wanted):
            inside = copy.box.relative_to(wanted)
            offset = target.offset_bytes + sum(
                i * s for i, s in zip(inside, target.strides_bytes, strict=True)
            )
            fragment = Fragment(stored.spec, copy.cell)
            self._pack(copy.pack).read_box(fragment, copy.start, copy.box, target, offset)

    def read(self, name: str, box: Box | None = None) -> ByteArray:
        """The bytes of a box of a tensor (None: of all of it), dense, in C order; as ``fill``."""
        spec = self.manifest.tensors[name].spec
        wanted = box or spec.whole
        data = np.empty(math.prod(wanted.shape) * spec.item_bytes, np.uint8)
        self.fill(name, wanted, StridedBytes(data, 0, dense_strides(wanted.shape, spec.item_bytes)))
        return data

    def verify(self, pack: int) -> None:
        """Check every byte of a pack, by its number in the manifest; raises DamagedError."""
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

    def _pack(self, number: int) -> PackReader:
        if number not in self._packs:
            record = self.manifest.packs[number]
            reader = PackReader(self.step_path / record.file, record, threads=self._threads)
            self._packs[number] = self._files.enter_context(reader)
        return self._packs[number]
