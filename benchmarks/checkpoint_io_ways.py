"""Every way to save and to load in the checkpoint benchmark, as one rank carries it out.

All ways do the same work: a save is durable when it is over, a load fills tensors that are there
already. Peers are used as their documentation says, and in the best mode that they have for it.
"""

import os
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoint_io_files import SyncCounter, read_direct, sync_path, write_direct
from checkpoint_io_plan import time_plan
from checkpoint_io_state import Held, hold
from checkpoint_io_turns import (
    BOXES,
    DCP,
    DCP_SAFETENSORS,
    DCP_THREADS,
    MEMCPY,
    ONE,
    OURS,
    RANKS,
    RAW,
    ROWS,
    SAFETENSORS,
    SAVE,
    STRIDED,
    TENSORSTORE,
    TORCH,
    TP,
    UNCHECKED,
    Size,
    Turn,
)
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.copy_plan import plan_copies
from everstep.checkpoint.kernels import copy_box
from everstep.checkpoint.torch_collective import ProcessGroupCollective
from everstep.checkpoint.torch_layout import strided_bytes
from everstep.checkpoint.torch_state import State, tensors_of

SAVED, TARGET = "saved", "target"
_FILE = "checkpoint"


class Worker:
    """One rank: the state it saves, the state it loads into, and every way to do either."""

    def __init__(self, rank: int, size: Size) -> None:
        warnings.simplefilter("ignore")  # peers' advice for training jobs
        self._rank, self._size = rank, size
        self._syncs = SyncCounter()
        self._collective = ProcessGroupCollective()
        self._everstep: dict[str, Checkpointer] = {}
        source = hold(size, ROWS, rank)
        self._held = {(SAVED, ROWS): source}
        memory = None
        for layout in (BOXES, TP, ROWS):
            held = self._held[TARGET, layout] = hold(size, layout, rank, memory)
            memory = held.memory  # one layout is loaded at a time
        source.fill()
        self._strided = {
            layout: strided_pairs(source, self._held[TARGET, layout]) for layout in (BOXES, TP)
        }
        if rank == 0:
            whole = self._held[SAVED, ONE] = self._held[TARGET, ONE] = hold(size, ONE, rank)
            whole.fill()  # loading brings the same values back

    def turn(self, turn: Turn, path: Path, step: int, check: bool) -> dict[str, Any] | None:
        """One save or load; when it began and ended, its CPU seconds and syncs on this rank.

        None on a rank that has no part in it. With ``check``, a load starts from zeroes, and what
        it has loaded is compared.
        """
        held = self._held.get((SAVED if turn.kind == SAVE else TARGET, turn.layout))
        check = check and turn.kind != SAVE and turn.way not in (RAW, MEMCPY, STRIDED)
        if check and held is not None:
            held.memory.fill(0)
        dist.barrier()
        if held is None:
            return None
        act = (SAVES if turn.kind == SAVE else LOADS)[turn.way]
        syncs, cpu_s, began_s = self._syncs.count, _cpu_s(), time.monotonic()
        act(self, held, path, step)
        ended_s = time.monotonic()
        taken = {
            "began_s": began_s,
            "ended_s": ended_s,
            "cpu_s": _cpu_s() - cpu_s,
            "syncs": self._syncs.count - syncs,
        }
        if check and (wrong := held.wrong()):
            raise AssertionError(f"{turn} gave other values: {wrong[:5]}")
        return taken

    def plan(self, tensors: int) -> dict[str, float] | None:
        """See ``time_plan``; on rank 0, the others wait."""
        return time_plan(tensors) if self._rank == 0 else None

    def forget(self, path: Path) -> None:
        """Delete all of everstep's checkpoints but the newest, as a run with ``keep=1`` would."""
        if self._rank == 0:
            directory = CheckpointDirectory(path)
            for step_id in directory.committed()[:-1]:
                directory.delete(step_id)

    def checkpointer(self, held: Held, path: Path) -> Checkpointer:
        """A run has one for all its saves."""
        if held.layout not in self._everstep:
            self._everstep[held.layout] = Checkpointer(path, keep=10**6, **self.place(held))
        return self._everstep[held.layout]

    def place(self, held: Held) -> dict[str, Any]:
        """Who this rank is, for a Checkpointer."""
        if held.layout == ONE:
            return {}
        return {"collective": self._collective, "mesh": held.mesh, "coordinate": held.coordinate}


def _cpu_s() -> float:
    """CPU time of this process, its threads and its ended children."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def _raw_file(path: Path, held: Held, rank: int) -> Path:
    return path / f"{0 if held.layout == ONE else rank}"


def raw_write(worker: Worker, held: Held, path: Path, step: int) -> None:
    """As many bytes from aligned memory to one new file per rank."""
    path.mkdir(parents=True, exist_ok=True)
    write_direct(_raw_file(path, held, worker._rank), held.memory)


def raw_read(worker: Worker, held: Held, path: Path, step: int) -> None:
    """Back into aligned memory."""
    read_direct(_raw_file(path, held, worker._rank), held.memory)


def memcpy(worker: Worker, held: Held, path: Path, step: int) -> None:
    """As many bytes from memory to memory."""
    source = worker._held[SAVED, held.layout].memory
    if source is not held.memory:
        np.copyto(held.memory[: source.size], source)
        return
    half = len(held.memory) // 2  # one rank has one copy: its halves, to and fro
    for begin, end in ((half, 2 * half), (0, half)):
        np.copyto(held.memory[begin:end], held.memory[half - begin : 2 * half - begin])


def strided_copy(worker: Worker, held: Held, path: Path, step: int) -> None:
    """The copies that fill a layout out of row shards, from memory to memory, by NumPy."""
    for target, source in worker._strided[held.layout]:
        np.copyto(target, source)


def strided_pairs(shards: Held, held: Held) -> list[tuple[np.ndarray, np.ndarray]]:
    """What to copy where; the own row shards stand for those of all ranks: they look the same."""
    pairs = []
    for name, local in held.locals.items():
        shard, box = shards.locals[name], held.boxes[name]
        rows = len(shard)
        inner = tuple(slice(o, o + n) for o, n in zip(box.offset[1:], box.shape[1:], strict=True))
        for begin in range(0, held.shapes[name][0], rows):
            lo = max(begin, box.offset[0])
            hi = min(begin + rows, box.offset[0] + box.shape[0])
            if lo < hi:
                target = local[lo - box.offset[0] : hi - box.offset[0]]
                pairs.append((target, shard[(slice(lo - begin, hi - begin), *inner)]))
    return pairs


def everstep_save(worker: Worker, held: Held, path: Path, step: int) -> None:
    """``Checkpointer.save``."""
    worker.checkpointer(held, path).save(step, State(model=held.module))


def everstep_load(worker: Worker, held: Held, path: Path, step: int) -> None:
    """``Checkpointer.load``, from opening the directory on."""
    with Checkpointer(path, read_only=True, **worker.place(held)) as checkpointer:
        checkpointer.load(State(model=held.module))


def everstep_unchecked(worker: Worker, held: Held, path: Path, step: int) -> None:
    """Only the planned copies out of mapped packs: what a load costs without its checksums."""
    directory = CheckpointDirectory(path)
    step_id = directory.find(None)
    assert step_id is not None
    manifest = directory.manifest(step_id)
    packs: dict[int, np.ndarray] = {}
    for name, tensor in tensors_of(State(model=held.module)).items():
        stored, wanted = manifest.tensors[name], tensor.fragment.box
        item_bytes, starts = stored.spec.item_bytes, manifest.starts(name)
        target = strided_bytes(tensor.local)
        for copy in plan_copies(
            stored.layout, stored.packs, starts, item_bytes, wanted, target.strides_bytes
        ):
            if copy.pack not in packs:
                record = manifest.packs[copy.pack]
                file = directory.step_path(step_id) / record.file
                packs[copy.pack] = np.memmap(file, np.uint8, "r")[record.data_start :]
            copy_box(
                target.buffer,
                target.offset_bytes + copy.target_bytes,
                target.strides_bytes,
                packs[copy.pack],
                copy.begin,
                copy.strides_bytes,
                copy.shape,
                item_bytes,
            )


class _OneRankPlanner(DefaultSavePlanner):
    """Plans are cached by the planner's class: those of one rank apart from those of four."""


def _dcp_save(
    writer: Callable[[Path], FileSystemWriter], cached: bool = False
) -> Callable[[Worker, Held, Path, int], None]:
    def save(worker: Worker, held: Held, path: Path, step: int) -> None:
        alone = held.layout == ONE
        planner = _OneRankPlanner if alone else DefaultSavePlanner
        dcp.save(
            dict(held.tensors),
            storage_writer=writer(path),
            planner=planner(enable_plan_caching=cached),
            no_dist=alone,
        )

    return save


def _dcp_load(
    reader: Callable[[Path], FileSystemReader],
) -> Callable[[Worker, Held, Path, int], None]:
    def load(worker: Worker, held: Held, path: Path, step: int) -> None:
        dcp.load(dict(held.tensors), storage_reader=reader(path), no_dist=held.layout == ONE)

    return load


def torch_save(worker: Worker, held: Held, path: Path, step: int) -> None:
    """``torch.save``, then what makes it durable."""
    path.mkdir(parents=True)
    torch.save(held.tensors, path / _FILE)
    sync_path(path / _FILE)
    sync_path(path)


def torch_load(worker: Worker, held: Held, path: Path, step: int) -> None:
    """``torch.load(mmap=True)``, copied into the tensors."""
    found = torch.load(path / _FILE, mmap=True, weights_only=True)
    for name, tensor in held.tensors.items():
        tensor.copy_(found[name])


def safetensors_save(worker: Worker, held: Held, path: Path, step: int) -> None:
    """``save_file``, then what makes it durable."""
    from safetensors.torch import save_file

    path.mkdir(parents=True)
    save_file(held.tensors, path / _FILE)
    sync_path(path / _FILE)
    sync_path(path)


def safetensors_load(worker: Worker, held: Held, path: Path, step: int) -> None:
    """Tensors of the mapped file, copied into ours."""
    from safetensors import safe_open

    with safe_open(path / _FILE, framework="pt") as file:
        for name, tensor in held.tensors.items():
            tensor.copy_(file.get_tensor(name))


def tensorstore_save(worker: Worker, held: Held, path: Path, step: int) -> None:
    """One uncompressed zarr3 array per tensor, in as many chunks of rows as there are ranks."""
    import tensorstore as ts

    with ExitStack() as pending:
        for name, array in held.locals.items():
            chunk = [max(1, array.shape[0] // RANKS), *array.shape[1:]]
            metadata = {
                "shape": list(array.shape),
                "data_type": "float32",
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            }
            store = ts.open(
                {"driver": "zarr3", "kvstore": _store(path / name), "metadata": metadata},
                create=True,
            ).result()
            pending.callback(store.write(array).result)


def tensorstore_load(worker: Worker, held: Held, path: Path, step: int) -> None:
    """The box of each array straight into our memory, all at once."""
    import tensorstore as ts

    opened = {
        name: ts.open({"driver": "zarr3", "kvstore": _store(path / name)}, open=True)
        for name in held.locals
    }
    with ExitStack() as pending:
        for name, array in held.locals.items():
            box = held.boxes[name]
            region = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
            source = opened[name].result()[region].translate_to[(0,) * array.ndim]
            pending.callback(ts.array(array).write(source).result)


def _store(path: Path) -> dict[str, str]:
    return {"driver": "file", "path": f"{path}/"}


Act = Callable[[Worker, Held, Path, int], None]
SAVES: Mapping[str, Act] = MappingProxyType(
    {
        RAW: raw_write,
        OURS: everstep_save,
        DCP: _dcp_save(FileSystemWriter),
        DCP_THREADS: _dcp_save(lambda p: FileSystemWriter(p, thread_count=2), cached=True),
        DCP_SAFETENSORS: _dcp_save(
            lambda p: HuggingFaceStorageWriter(str(p), save_distributed=True)
        ),
        TORCH: torch_save,
        SAFETENSORS: safetensors_save,
        TENSORSTORE: tensorstore_save,
    }
)
LOADS: Mapping[str, Act] = MappingProxyType(
    {
        RAW: raw_read,
        MEMCPY: memcpy,
        STRIDED: strided_copy,
        OURS: everstep_load,
        UNCHECKED: everstep_unchecked,
        DCP: _dcp_load(FileSystemReader),
        DCP_SAFETENSORS: _dcp_load(lambda p: HuggingFaceStorageReader(str(p))),
        TORCH: torch_load,
        SAFETENSORS: safetensors_load,
        TENSORSTORE: tensorstore_load,
    }
)
