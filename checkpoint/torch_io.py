"""Live tensors <-> packs: the bytes of a save and of a load."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from everstep.checkpoint.layout import Fragment
from everstep.checkpoint.manifest import Manifest
from everstep.checkpoint.pack import PackPlan, PackRecord, StridedBytes, write_pack
from everstep.checkpoint.step_reader import StepReader
from everstep.checkpoint.torch_layout import LiveTensor, strided_bytes


def write_tensors(
    path: Path,
    plan: PackPlan,
    live: Mapping[Fragment, LiveTensor],
    *,
    threads: int = 1,
    on_bytes: Callable[[int], None] | None = None,
) -> PackRecord:
    """Write the pack of this rank; tensors of a device come to the host one at a time."""

    def source_of(fragment: Fragment) -> StridedBytes:
        return strided_bytes(live[fragment].local.cpu())

    return write_pack(path, plan, source_of, threads=threads, on_bytes=on_bytes)


def fill_tensors(
    tensors: Iterable[LiveTensor], manifest: Manifest, step_path: Path, *, threads: int = 1
) -> None:
    """Fill live tensors, one at a time, with their boxes out of the packs that hold these.

    Raises:
        DamagedError: a pack is not what the manifest says.
    """
    with StepReader(step_path, manifest, threads=threads) as reader, torch.no_grad():
        for tensor in tensors:
            on_host = tensor.local.device.type == "cpu"
            host = tensor.local if on_host else torch.empty_like(tensor.local, device="cpu")
            reader.fill(tensor.fragment.spec.name, tensor.fragment.box, strided_bytes(host))
            if not on_host:
                tensor.local.copy_(host)
