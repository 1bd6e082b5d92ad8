"""Copying a live state off a GPU into a slot, on a stream of its own (torch; CUDA).

The copies wait for what the computing stream has been given before the save, and what it is given
after the fence waits for the copies: the host waits for neither. Slots are registered with the
driver once, so that the GPU writes into them by itself. Checksums are computed by the processor
once the copies are there.
"""

import contextlib
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from everstep.checkpoint.copier import Copier
from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.kernels import crc32c_blocks
from everstep.checkpoint.pack import BLOCK_BYTES, PackPlan
from everstep.checkpoint.snapshots.capture import CapturePlan, HostPlan
from everstep.checkpoint.snapshots.live_state import LiveState, Look

_POLL_S = 0.001

Copies = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Where to, in host memory, dense; and where from, on a device."""


class DeviceCalls(Protocol):
    """All that is asked of devices and their driver."""

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on a device."""
        ...

    def pin(self, memory: ByteArray) -> str | None:
        """Let devices write to host memory by themselves; why not, where that is refused."""
        ...

    def unpin(self, memory: ByteArray) -> None:
        """Take that back, before the memory goes."""
        ...

    def copy(self, copies: Copies) -> Mapping[Any, Any]:
        """Begin with copies, after what was given to the current streams; a mark per device."""
        ...

    def hold(self, marks: Mapping[Any, Any]) -> None:
        """What the current streams are given from now on waits for the copies before the marks."""
        ...

    def passed(self, marks: Mapping[Any, Any]) -> bool:
        """Whether all copies before the marks are complete."""
        ...


class CudaCalls:
    """Devices of CUDA: a stream for copies on each; marks are events."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def owns(self, tensor: torch.Tensor) -> bool:
        """See ``DeviceCalls``."""
        return tensor.is_cuda

    def pin(self, memory: ByteArray) -> str | None:
        """See ``DeviceCalls``."""
        runtime = torch.cuda.cudart()
        error = runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, 1)  # 1: portable
        if int(error) == 0:
            return None
        with contextlib.suppress(RuntimeError):  # else the next launch would fail for this error
            torch.ones(1, device="cuda").add_(1)
        return str(runtime.cudaGetErrorString(error))

    def unpin(self, memory: ByteArray) -> None:
        """See ``DeviceCalls``."""
        torch.cuda.cudart().cudaHostUnregister(memory.ctypes.data)

    def copy(self, copies: Copies) -> dict[torch.device, torch.cuda.Event]:
        """See ``DeviceCalls``."""
        marks = {}
        for device in {source.device for _, source in copies}:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            stream = self._streams[device]
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for target, source in copies:
                    if source.device == device:
                        target.copy_(source.contiguous(), non_blocking=True)
                marks[device] = torch.cuda.Event()
                marks[device].record(stream)
        return marks

    def hold(self, marks: Mapping[torch.device, torch.cuda.Event]) -> None:
        """See ``DeviceCalls``."""
        for device, event in marks.items():
            torch.cuda.current_stream(device).wait_event(event)

    def passed(self, marks: Mapping[torch.device, torch.cuda.Event]) -> bool:
        """See ``DeviceCalls``."""
        return all(event.query() for event in marks.values())


class DeviceCapture:
    """One snapshot on its way from devices into a slot; see ``Capture``.

    Args:
        calls: to the devices.
        copies: what has to be copied; kept alive until it is, since allocators would give the
            memory of a tensor that is gone to others.
        slot: the memory.
        data: the part of it that fragments are copied to.
        look: what was taken when the step was saved.
        threads: for the checksums.
    """

    def __init__(
        self,
        calls: DeviceCalls,
        copies: Copies,
        slot: ByteArray,
        data: ByteArray,
        look: Look,
        threads: int,
    ) -> None:
        self.slot, self.look = slot, look
        self.crcs: NDArray[np.uint32] = np.zeros(-(-len(data) // BLOCK_BYTES), np.uint32)
        self._calls, self._copies, self._data, self._threads = calls, copies, data, threads
        self._begun_s = time.perf_counter()
        self._elapsed_s: float | None = None
        self._cancelled = False
        self._marks = calls.copy(copies)

    @property
    def done(self) -> bool:
        """See ``Capture``: the slot is complete, checksums included."""
        return self._elapsed_s is not None

    @property
    def copied_bytes(self) -> int:
        """See ``Capture``: all or nothing."""
        return len(self._data) if self.done or self._calls.passed(self._marks) else 0

    @property
    def elapsed_s(self) -> float:
        """See ``Capture``."""
        return self._elapsed_s or time.perf_counter() - self._begun_s

    def help(self) -> float:
        """See ``Capture``: what the calling thread gives to devices from now on comes later."""
        begun_s = time.perf_counter()
        if not self.done:
            self._calls.hold(self._marks)
        return time.perf_counter() - begun_s

    def wait(self, timeout_s: float) -> bool:
        """See ``Capture``; for one thread, which computes the checksums."""
        deadline_s = time.perf_counter() + timeout_s
        while not self.done and not self._cancelled:
            if self._calls.passed(self._marks):
                crc32c_blocks(self._data, BLOCK_BYTES, out=self.crcs, threads=self._threads)
                self._elapsed_s = time.perf_counter() - self._begun_s
                self._copies = ()
            elif time.perf_counter() > deadline_s:
                break
            else:
                time.sleep(_POLL_S)
        return self.done

    def cancel(self) -> None:
        """See ``Capture``: devices cannot be stopped, so that their copies are waited for."""
        self._cancelled = True
        with contextlib.suppress(RuntimeError):  # a device that has failed copies no more
            while not self._calls.passed(self._marks):
                time.sleep(_POLL_S)


class DevicePlan(CapturePlan):
    """What of a state on devices is copied at each step; see ``CapturePlan``.

    What optimizers change is read where it is until the fence; everything else on a device is
    cloned there first. Tensors in host memory, such as the steps of optimizers, are copied by the
    caller: they are few and small.

    Args:
        live: the state.
        pack: what this rank writes of it.
        file: the name of the pack.
        world_size: number of ranks.
        calls: to the devices.
        threads: for the checksums.
    """

    def __init__(
        self,
        live: LiveState,
        pack: PackPlan,
        file: str,
        world_size: int,
        calls: DeviceCalls,
        threads: int,
    ) -> None:
        super().__init__(live, pack, file, world_size)
        self._calls, self._threads = calls, threads
        self._pinned: dict[int, ByteArray | None] = {}
        """Slots by address that the driver was told of; None: it refused."""

    def begin(
        self, copier: Copier, slot: ByteArray, look: Look, bytes_per_s: float | None
    ) -> DeviceCapture:
        """Copy at once what is to be, and begin with the rest; devices have no rate."""
        self._pin(slot)
        data = self._data(slot)
        copies = []
        with torch.no_grad():
            for fragment, start in zip(self.pack.fragments, self.pack.starts, strict=True):
                if not fragment.size_bytes:
                    continue
                tensor = look.moving.get(fragment) or self.live.fixed[fragment]
                room = torch.from_numpy(data[start : start + fragment.size_bytes])
                target = room.view(tensor.local.dtype).view(tensor.local.shape)
                if not self._calls.owns(tensor.local):
                    target.copy_(tensor.local)
                elif self.live.is_late(fragment, tensor):
                    copies.append((target, tensor.local))
                else:
                    copies.append((target, tensor.local.clone()))
            return DeviceCapture(self._calls, copies, slot, data, look, self._threads)

    def close(self) -> None:
        """See ``CapturePlan``: the driver forgets the slots."""
        for memory in self._pinned.values():
            if memory is not None:
                self._calls.unpin(memory)
        self._pinned.clear()

    def _pin(self, slot: ByteArray) -> None:
        if slot.ctypes.data in self._pinned:
            return
        refusal = self._calls.pin(slot)
        if refusal is not None and None not in self._pinned.values():
            warnings.warn(
                f"{len(slot)} bytes of memory for snapshots cannot be registered with the GPU "
                f"({refusal}): saves wait for the copies; raise the limit of locked memory "
                "(ulimit -l unlimited)",
                RuntimeWarning,
                stacklevel=6,
            )
        self._pinned[slot.ctypes.data] = slot if refusal is None else None


def capture_plan(
    live: LiveState, pack: PackPlan, file: str, world_size: int, *, threads: int
) -> CapturePlan:
    """The plan for where the tensors of a state are.

    Args:
        live: the state.
        pack: what this rank writes of it.
        file: the name of the pack.
        world_size: number of ranks.
        threads: for checksums of what comes from devices.
    """
    calls = CudaCalls()
    tensors = [*live.fixed.values(), *live.first.moving.values()]
    if any(calls.owns(tensor.local) for tensor in tensors):
        return DevicePlan(live, pack, file, world_size, calls, threads)
    return HostPlan(live, pack, file, world_size)
