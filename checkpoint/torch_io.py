"""Live tensors <-> packs: the bytes of a save and of a load."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from everstep.checkpoint.layout import Fragment
from everstep.checkpoint.manifest import Manifest
from everstep.checkpoint.pack import PackPlan, PackReader, PackRecord, StridedBytes, write_pack
from everstep.checkpoint.reshard import plan_load
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
    with ExitStack() as files, torch.no_grad():
        readers: dict[int, PackReader] = {}
        for tensor in tensors:
            wanted = tensor.fragment.box
            on_host = tensor.local.device.type == "cpu"
            host = tensor.local if on_host else torch.empty_like(tensor.local, device="cpu")
            target = strided_bytes(host)
            stored = manifest.tensors[tensor.fragment.spec.name]
            for copy in plan_load(stored.grid, stored.packs, wanted):
                if copy.pack not in readers:
                    record = manifest.packs[copy.pack]
                    reader = PackReader(step_path / record.file, record, threads=threads)
                    readers[copy.pack] = files.enter_context(reader)
                index = manifest.pack_indexes[copy.pack]
                start, fragment = index.starts[stored.spec.name, copy.cell.offset]
                offset = target.offset_bytes + sum(
                    i * s
                    for i, s in zip(copy.box.relative_to(wanted), target.strides_bytes, strict=True)
                )
                readers[copy.pack].read_box(fragment, start, copy.box, target, offset)
            if not on_host:
                tensor.local.copy_(host)
