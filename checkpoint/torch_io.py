"""Live tensors <-> packs: the bytes of a save and of a load."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from everstep.checkpoint.layout import Box, Fragment
from everstep.checkpoint.pack import PackPlan, PackRecord, StridedBytes, stream_pack
from everstep.checkpoint.ranged_read import Request
from everstep.checkpoint.step_reader import StepReader
from everstep.checkpoint.store import StoreWriter
from everstep.checkpoint.torch_layout import LiveTensor, strided_bytes

STAGING_BYTES = 16 * 2**20
"""Host memory through which tensors of a device are filled, at a time."""


def write_tensors(
    out: StoreWriter,
    file: str,
    plan: PackPlan,
    live: Mapping[Fragment, LiveTensor],
    *,
    threads: int = 1,
    on_bytes: Callable[[int], None] | None = None,
) -> PackRecord:
    """Write the pack of this rank; tensors of a device come to the host one at a time."""

    def source_of(fragment: Fragment) -> StridedBytes:
        return strided_bytes(live[fragment].local.cpu())

    return stream_pack(out, file, plan, source_of, threads=threads, on_bytes=on_bytes)


def fill_tensors(
    tensors: Iterable[LiveTensor],
    reader: StepReader,
    *,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Fill live tensors with their boxes out of the packs that hold these.

    Tensors of the host are filled in place, those of a device in pieces through the host.

    Args:
        tensors: what to fill.
        reader: of the checkpoint.
        on_bytes: called with the bytes filled so far.

    Raises:
        DamagedError: a pack is not what the manifest says.
    """
    before_bytes = 0

    def told(done_bytes: int) -> None:
        if on_bytes is not None:
            on_bytes(before_bytes + done_bytes)

    in_place: list[LiveTensor] = []
    staged: list[LiveTensor] = []
    for tensor in tensors:
        (in_place if tensor.local.device.type == "cpu" else staged).append(tensor)
    with torch.no_grad():
        reader.fill_all(host_requests(in_place), told)
        before_bytes = sum(t.fragment.size_bytes for t in in_place)
        for batch in _batches(staged):
            hosts = [torch.empty_like(part, device="cpu") for _, _, part in batch]
            reader.fill_all(
                [_request(t, box, h) for (t, box, _), h in zip(batch, hosts, strict=True)], told
            )
            for (_, _, part), host in zip(batch, hosts, strict=True):
                part.copy_(host)
            before_bytes += sum(host.nbytes for host in hosts)


def host_requests(tensors: Iterable[LiveTensor]) -> list[Request]:
    """What to read for tensors of the host, straight into them."""
    return [_request(t, t.fragment.box, t.local) for t in tensors]


Part = tuple[LiveTensor, Box, torch.Tensor]


def _batches(tensors: Sequence[LiveTensor]) -> Iterable[list[Part]]:
    """Tensors in batches of about ``STAGING_BYTES``; large ones by rows of their first dim."""
    batch: list[Part] = []
    size = 0
    for tensor in tensors:
        for box, part in _rows(tensor):
            batch.append((tensor, box, part))
            size += part.nbytes
            if size >= STAGING_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _rows(tensor: LiveTensor) -> Iterable[tuple[Box, torch.Tensor]]:
    box, local = tensor.fragment.box, tensor.local
    if local.nbytes <= STAGING_BYTES or not box.shape:
        yield box, local
        return
    count = max(1, STAGING_BYTES * box.shape[0] // local.nbytes)
    for begin in range(0, box.shape[0], count):
        n = min(count, box.shape[0] - begin)
        rows = Box((box.offset[0] + begin, *box.offset[1:]), (n, *box.shape[1:]))
        yield rows, local[begin : begin + n]


def _request(tensor: LiveTensor, box: Box, host: torch.Tensor) -> Request:
    return Request(tensor.fragment.spec.name, box, strided_bytes(host))
