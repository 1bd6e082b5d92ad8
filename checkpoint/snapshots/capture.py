"""Copying a live state into a slot, beside the training (torch; the copies are native)."""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from everstep.checkpoint.copier import Copier, CopyJob, CopyPlan
from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.kernels import crc32c
from everstep.checkpoint.layout import Fragment
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.manifest import Part, encode_part
from everstep.checkpoint.pack import BLOCK_BYTES, PackPlan, PackRecord, dense_strides
from everstep.checkpoint.snapshots.live_state import LiveState, Look
from everstep.checkpoint.snapshots.slot_format import Seal, SlotLayout, slot_layout, write_seal


class HostCapture:
    """One snapshot on its way into a slot.

    Args:
        job: the copies that are under way.
        slot: the memory.
        crcs: the checksums of the blocks of data, complete when the job is done.
        look: what was taken when the step was saved.
    """

    def __init__(self, job: CopyJob, slot: ByteArray, crcs: NDArray[np.uint32], look: Look) -> None:
        self.slot, self.crcs, self.look, self._job = slot, crcs, look, job

    @property
    def done(self) -> bool:
        """Whether everything is copied."""
        return self._job.done

    @property
    def copied_bytes(self) -> int:
        """How much is copied so far."""
        return self._job.copied_bytes

    def help(self) -> float:
        """Take part in the copying until everything is copied; the seconds that it took."""
        return self._job.help()

    def wait(self, timeout_s: float) -> bool:
        """Sleep until everything is copied, or for a time; whether it is."""
        return self._job.wait(timeout_s)

    @property
    def elapsed_s(self) -> float:
        """From the begin until everything was copied, or until now."""
        return self._job.stats().elapsed_s

    def cancel(self) -> None:
        """Copy no more; returns when no thread reads the state any more."""
        self._job.cancel()


class CapturePlan:
    """What this rank copies of each step, and where it goes in a slot.

    Args:
        live: the state.
        pack: what this rank writes of it.
        file: the name of the pack.
        world_size: number of ranks.
    """

    def __init__(self, live: LiveState, pack: PackPlan, file: str, world_size: int) -> None:
        self.live, self.pack = live, pack
        self._file, self._world_size = file, world_size
        self._aim()
        self.probes = live.probes(pack.fragments)
        """An optimizer and a tensor that it updates, for each that has one here."""
        sample = self._part(StepId(0, 0), 0, live.first.context)
        self.layout: SlotLayout = slot_layout(pack.size_bytes, len(encode_part(sample)))

    def _aim(self) -> None:
        """Take down where everything is now."""
        live, pack = self.live, self.pack
        self._found = live.found
        self._addresses = np.zeros(len(pack.fragments), np.uint64)
        self._staged: dict[int, torch.Tensor] = {}
        strides = []
        for index, fragment in enumerate(pack.fragments):
            tensor = live.fixed.get(fragment) or live.first.moving[fragment]
            if fragment in live.fixed and live.is_late(fragment, tensor):
                self._addresses[index] = tensor.local.data_ptr()
                strides.append(_strides(tensor.local))
            else:
                strides.append(dense_strides(fragment.box.shape, fragment.spec.item_bytes))
                if fragment.size_bytes:
                    self._staged[index] = torch.empty(tensor.local.shape, dtype=tensor.local.dtype)
        self._copies = CopyPlan(
            pack.starts,
            [fragment.box.shape for fragment in pack.fragments],
            strides,
            [fragment.spec.item_bytes for fragment in pack.fragments],
            data_bytes=pack.data_bytes,
            block_bytes=BLOCK_BYTES,
        )

    def begin(
        self, copier: Copier, slot: ByteArray, look: Look, bytes_per_s: float | None
    ) -> HostCapture:
        """Copy at once what is to be, and begin with the rest, at a rate (None: full speed)."""
        if self.live.found != self._found:
            self._aim()
        addresses = self._addresses.copy()
        with torch.no_grad():
            for index, staged in self._staged.items():
                fragment = self.pack.fragments[index]
                tensor = look.moving.get(fragment) or self.live.fixed[fragment]
                local = tensor.local
                if self.live.is_late(fragment, tensor) and local.is_contiguous():
                    addresses[index] = local.data_ptr()
                else:
                    staged.copy_(local)
                    addresses[index] = staged.data_ptr()
        crcs = np.zeros(self.pack.n_blocks, np.uint32)
        job = copier.start(self._copies, addresses, self._data(slot), crcs, bytes_per_s=bytes_per_s)
        return HostCapture(job, slot, crcs, look)

    def seal(self, capture: HostCapture, step_id: StepId, owner: bytes, lineage: Any) -> None:
        """Complete a slot whose data is there."""
        table = capture.crcs.astype("<u4").tobytes()
        header = self.pack.header
        start = self.layout.pack_start
        end = start + self.pack.size_bytes
        capture.slot[start : start + len(header)] = np.frombuffer(header, np.uint8)
        capture.slot[end - len(table) : end] = np.frombuffer(table, np.uint8)
        context = capture.look.context
        if self.pack.rank == 0:
            context = {**context, "lineage": lineage}
        part = encode_part(self._part(step_id, crc32c(table, crc32c(header)), context))
        write_seal(
            capture.slot,
            part,
            Seal(
                step_id=step_id,
                rank=self.pack.rank,
                world_size=self._world_size,
                owner=owner,
                part_start=self.layout.part_start,
                part_bytes=len(part),
                pack_start=start,
                pack_bytes=self.pack.size_bytes,
                part_crc32c=crc32c(part),
            ),
        )

    def sample(self, fragment: Fragment) -> bytes | None:
        """Some of the values that a tensor has now; None where to look would take long."""
        values = self.live.fixed[fragment].local.detach()
        if values.device.type != "cpu":
            return None
        while values.ndim > 1:
            values = values[0]
        values = values.reshape(-1)[: -(-_SAMPLE_BYTES // values.element_size())].contiguous()
        if values.is_complex():
            values = torch.view_as_real(values)
        return values.view(torch.uint8).numpy().tobytes()

    def _data(self, slot: ByteArray) -> ByteArray:
        begin = self.layout.pack_start + len(self.pack.header)
        return slot[begin : begin + self.pack.data_bytes]

    def _part(self, step_id: StepId, checksum: int, context: dict[str, Any]) -> Part:
        record = PackRecord(
            file=self._file,
            rank=self.pack.rank,
            size_bytes=self.pack.size_bytes,
            data_start=len(self.pack.header),
            data_bytes=self.pack.data_bytes,
            crc32c=checksum,
        )
        return Part(
            generation=step_id.generation,
            step=step_id.step,
            rank=self.pack.rank,
            world_size=self._world_size,
            pack=record,
            fragments=self.pack.fragments,
            context=context,
        )


_SAMPLE_BYTES = 1024


def _strides(local: torch.Tensor) -> tuple[int, ...]:
    item = local.element_size()
    if math.prod(local.shape) == 0:
        return dense_strides(local.shape, item)
    return tuple(int(stride) * item for stride in local.stride())
