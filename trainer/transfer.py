"""Micro batches on their way to the device: the next is copied while the current one is used."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from everstep.trainer.data import MicroBatch

T = TypeVar("T")


@dataclass(frozen=True)
class DeviceBatch:
    """A ``MicroBatch`` whose arrays have become tensors on a rank's device; the same fields."""

    tokens_BL: Tensor
    targets_BL: Tensor
    sample_B: Tensor


class Transfer(Protocol[T]):
    """Brings a micro batch to a device, in two halves with time between them."""

    def start(self, batch: MicroBatch) -> T:
        """Begin to copy; the caller does not wait."""
        ...

    def finish(self, started: T) -> DeviceBatch:
        """What arrives, for kernels that are launched from now on."""
        ...


def in_flight(batches: Iterable[MicroBatch], transfer: Transfer[T]) -> Iterator[DeviceBatch]:
    """The micro batches on the device, in order; each is started before its predecessor is used."""
    previous: list[T] = []
    for batch in batches:
        started = transfer.start(batch)
        if previous:
            yield transfer.finish(previous.pop())
        previous.append(started)
    if previous:
        yield transfer.finish(previous.pop())


def transfer_to(device: torch.device) -> Transfer[Any]:
    """The way to ``device``."""
    return CudaTransfer(device) if device.type == "cuda" else HostTransfer()


class HostTransfer:
    """To the CPU: tensors share the memory of the arrays."""

    def start(self, batch: MicroBatch) -> DeviceBatch:
        """See ``Transfer``."""
        return _tensors(batch, torch.from_numpy)

    def finish(self, started: DeviceBatch) -> DeviceBatch:
        """See ``Transfer``."""
        return started


class CudaTransfer:
    """To a GPU: through pinned memory, on a stream of its own.

    torch's allocators keep both ends alive: pinned memory until the copy is done, and memory of
    the GPU, which belongs to the copying stream, until the stream that computes is done with it
    (``record_stream``).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def start(self, batch: MicroBatch) -> tuple[DeviceBatch, torch.cuda.Event]:
        """See ``Transfer``."""

        def copy(array: Any) -> Tensor:
            return torch.from_numpy(array).pin_memory().to(self._device, non_blocking=True)

        with torch.cuda.stream(self._stream):
            tensors = _tensors(batch, copy)
            return tensors, self._stream.record_event()

    def finish(self, started: tuple[DeviceBatch, torch.cuda.Event]) -> DeviceBatch:
        """See ``Transfer``; the GPU waits for the copy, the host does not."""
        tensors, copied = started
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(copied)
        for field in fields(tensors):
            getattr(tensors, field.name).record_stream(computing)
        return tensors


def _tensors(batch: MicroBatch, convert: Callable[[Any], Tensor]) -> DeviceBatch:
    return DeviceBatch(**{f.name: convert(getattr(batch, f.name)) for f in fields(batch)})
