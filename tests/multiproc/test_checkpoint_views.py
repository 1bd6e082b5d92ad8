"""What several ranks saved, each its shards, is read by programs that have never heard of us."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.torch_collective import ProcessGroupCollective
from everstep.checkpoint.torch_state import State
from everstep.checkpoint.views.zarr_references import write_references
from tests.support.foreign import run_foreign
from tests.support.spawn import run_ranks
from tests.support.view_programs import definitions

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(300)]

PLACED: dict[str, tuple[tuple[int, ...], torch.dtype, list[Placement]]] = {
    "rows": ((13, 3), torch.float32, [Shard(0), Shard(0)]),  # 4, 3, 3, 3
    "many": ((1001, 3), torch.bfloat16, [Shard(0), Shard(0)]),
    "both": ((7, 5), torch.bfloat16, [Shard(0), Shard(1)]),
    "columns": ((300, 7), torch.float64, [Replicate(), Shard(1)]),
    "copied": ((3,), torch.float16, [Replicate(), Replicate()]),
}


def _whole(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)


def _save(rank: int, world_size: int, root: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Module()
    for name, (shape, dtype, placements) in PLACED.items():
        sharded = distribute_tensor(_whole(shape, dtype), mesh, placements)
        model.register_parameter(name, nn.Parameter(sharded))
    collective = ProcessGroupCollective(timeout_s=30)
    place = {"dp": rank // 2, "tp": rank % 2}
    with Checkpointer(
        root, collective=collective, mesh={"dp": 2, "tp": 2}, coordinate=place
    ) as writer:
        writer.save(1, State(model=model))


PROGRAM = """
import json
import sys
from pathlib import Path

step, = Path("checkpoints").resolve().glob("step-*")
group = zarr.open_group("reference://", mode="r", storage_options={"fo": "references.json"})
for name, data in json.load(open("wanted.json")).items():
    assert open_tensor(f"{step.as_uri()}/", name).read().result().tobytes().hex() == data, name
    assert read_tensor(group, name).tobytes().hex() == data, name
    found = read_fragments(step, name)
    assert found.view(torch.uint8).numpy().tobytes().hex() == data, name
"""


def test_foreign_programs_read_what_four_ranks_saved(tmp_path: Path) -> None:
    run_ranks(_save, 4, tmp_path / "checkpoints")
    directory = CheckpointDirectory(tmp_path / "checkpoints")
    manifest = directory.manifest(StepId(1, 1))
    assert len(manifest.packs) == 4
    assert max(t.layout.n_cells for t in manifest.tensors.values()) == 4
    packs = str(directory.step_path(StepId(1, 1)))
    write_references(manifest, packs, tmp_path / "references.json")
    wanted = {
        f"model.{name}": _whole(shape, dtype).view(torch.uint8).numpy().tobytes().hex()
        for name, (shape, dtype, _) in PLACED.items()
    }
    (tmp_path / "wanted.json").write_text(json.dumps(wanted))
    sections = ("TensorStore", "zarr-python", "safetensors")
    run_foreign("".join(map(definitions, sections)) + PROGRAM, tmp_path)
