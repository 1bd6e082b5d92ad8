"""torch DCP over our storage on real process groups: layouts, kills, asynchronous saves."""

import multiprocessing
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed._shard.sharded_tensor.api import Shard as LocalShard
from torch.distributed.checkpoint import _async_process_executor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.distributed.checkpoint.state_dict_saver import (
    AsyncCheckpointerType,
    AsyncSaveResponse,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from everstep.checkpoint.views import dcp_versions, dcp_writer
from everstep.checkpoint.views.dcp import LoadPlanner, SavePlanner, StorageReader, StorageWriter
from tests.support.spawn import RankError, run_ranks

pytestmark = [
    pytest.mark.multiproc,
    pytest.mark.filterwarnings("ignore:torch.distributed is "),
]


class Uneven(nn.Module):
    """A column-parallel and a row-parallel matrix whose sizes nothing divides."""

    def __init__(self, n: int, tp: Any) -> None:
        super().__init__()
        for name, dim in (("columns", 0), ("rows", 1)):
            whole = torch.arange(float(n * n)).reshape(n, n)
            if tp is not None:
                pieces = whole.chunk(tp.size(), dim)
                mine = tp.get_local_rank()
                local = pieces[mine] if mine < len(pieces) else whole.narrow(dim, 0, 0)
                whole = DTensor.from_local(
                    local.contiguous(),
                    tp,
                    [Shard(dim)],
                    run_check=False,
                    shape=whole.shape,
                    stride=whole.stride(),
                )
            self.register_parameter(name, nn.Parameter(whole))


def _numbered(n: int) -> torch.Tensor:
    return torch.arange(float(n * n)).reshape(n, n)


def _uneven(rank: int, world_size: int, path: str, n: int, tp_size: int, save: bool) -> list[str]:
    """Save, or load into zeros and compare; what DCP's own planner says of it."""
    mesh = init_device_mesh("cpu", (world_size // tp_size, tp_size), mesh_dim_names=("dp", "tp"))
    model = Uneven(n, mesh["tp"])
    fully_shard(model, mesh=mesh["dp"])
    state = model.state_dict()
    if save:
        refused = []
        try:
            dcp.save(state, storage_writer=StorageWriter(path))
        except CheckpointException as e:
            refused = [str(cause[0]) for cause in e.failures.values()]
        dcp.save(state, storage_writer=StorageWriter(path), planner=SavePlanner())
        return refused
    for tensor in state.values():
        tensor.to_local().zero_()
    dcp.load(state, storage_reader=StorageReader(path), planner=LoadPlanner())
    for tensor in state.values():
        assert torch.equal(tensor.full_tensor(), _numbered(n))
    return []


@pytest.mark.parametrize("n", [13, pytest.param(7, marks=pytest.mark.slow)])
def test_uneven_tensor_parallelism(tmp_path: Path, n: int) -> None:
    """DCP's planner refuses 13 rows on dp3 x tp2, and mis-saves 7; ours keep both right."""
    path = str(tmp_path / "c")
    assert any(run_ranks(_uneven, 6, path, n, 2, True))
    run_ranks(_uneven, 2, path, n, 2, False)
    run_ranks(_uneven, 3, path, n, 1, False)
    found = _load_state_dict_from_keys(storage_reader=StorageReader(path))
    assert torch.equal(found["rows"], _numbered(n))


def _trained(world_size: int, shards: int, seed: int, steps: int) -> tuple[nn.Module, Any]:
    shape = (world_size // shards, shards)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * (seed + 1))
    for step in range(steps):
        torch.manual_seed(step)
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def _full(state: Any) -> Any:
    if isinstance(state, dict):
        return {k: _full(v) for k, v in state.items()}
    if isinstance(state, torch.Tensor):
        return (state.full_tensor() if isinstance(state, DTensor) else state).tolist()
    return state


def _train_and_save(rank: int, world_size: int, path: str, shards: int) -> Any:
    model, optimizer = _trained(world_size, shards, 1, 2)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save({**states, "epoch": 3, "mask": {1, 2}}, storage_writer=StorageWriter(path))
    return _full(states)


def _load_trained(rank: int, world_size: int, path: str, shards: int) -> Any:
    model, optimizer = _trained(world_size, shards, 0, 1)
    states: dict[str, Any] = dict(
        zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)
    )
    states |= {"epoch": 0, "mask": None}
    dcp.load(states, storage_reader=StorageReader(path))
    assert (states.pop("epoch"), states.pop("mask")) == (3, {1, 2})
    set_state_dict(
        model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"]
    )
    again = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    return _full(again)


def test_a_run_of_another_trainer_moves_from_four_ranks_to_two(tmp_path: Path) -> None:
    """HSDP 2 x 2 to FSDP2 on 2; model and optimizer as DCP users hold them."""
    saved = run_ranks(_train_and_save, 4, str(tmp_path / "c"), 2)
    loaded = run_ranks(_load_trained, 2, str(tmp_path / "c"), 2)
    assert saved[0]["optimizer"]["state"]
    assert all(found == saved[0] for found in (*saved, *loaded))


def _sharded_tensor(rank: int, world_size: int, path: str) -> None:
    rows = [2, 3]
    begin = sum(rows[:rank])
    whole = torch.arange(15.0).reshape(5, 3)

    def make(local: torch.Tensor) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shard = LocalShard.from_tensor_and_offsets(local, [begin, 0], rank)
            return init_from_local_shards([shard], 5, 3)

    mine = whole[begin : begin + rows[rank]].clone()
    dcp.save({"s": make(mine)}, storage_writer=StorageWriter(path))
    local = torch.zeros_like(mine)
    dcp.load({"s": make(local)}, storage_reader=StorageReader(path))
    assert torch.equal(local, mine)
    one = {"s": torch.zeros(5, 3)}
    dcp.load(one, storage_reader=StorageReader(path))
    assert torch.equal(one["s"], whole)


def test_sharded_tensors(tmp_path: Path) -> None:
    run_ranks(_sharded_tensor, 2, str(tmp_path / "c"))


def _state_of(value: float, mesh: Any) -> dict[str, Any]:
    whole = torch.full((5, 3), value)
    return {"t": dist.tensor.distribute_tensor(whole, mesh, [Shard(0)]), "value": value}


def _async(rank: int, world_size: int, path: str, kind: str) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    group = dist.new_group(backend="gloo")
    process = kind == "process"
    stager = None
    if kind == "stager":
        stager = DefaultStager(StagingOptions(False, False, True, False))
    if process:
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    for value in (1.0, 2.0):
        state = _state_of(value, mesh)
        answer = dcp.async_save(
            state,
            storage_writer=StorageWriter(path),
            process_group=group,
            async_stager=stager,
            async_checkpointer_type=(
                AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD
            ),
        )
        if isinstance(answer, AsyncSaveResponse):
            answer.staging_completion.result()
            answer = answer.upload_completion
        state["t"].to_local().fill_(-1)  # training goes on
        dist.all_reduce(torch.ones(1))
        answer.result()
    if stager is not None:
        stager.close()
    if process:
        _async_process_executor._CHECKPOINT_PROCESS = None  # ends it
    state = _state_of(0.0, mesh)
    dcp.load(state, storage_reader=StorageReader(path))
    assert state["value"] == 2
    assert (state["t"].to_local() == 2).all()


@pytest.mark.parametrize(
    "kind",
    [
        "thread",
        pytest.param("stager", marks=pytest.mark.slow),
        pytest.param("process", marks=pytest.mark.slow),
    ],
)
def test_asynchronous_saves(tmp_path: Path, kind: str) -> None:
    run_ranks(_async, 2, str(tmp_path / "c"), kind)


def _killed(rank: int, world_size: int, path: str, point: str) -> None:
    """Rank 0 is killed at a point of the second save."""
    state = {"a": torch.ones(4), "b": torch.full((3,), float(rank)), "n": 1}
    dcp.save(state, storage_writer=StorageWriter(path))

    def die(*args: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 0:
        owner, name = {
            "written": (dcp_writer.StorageWriter, "finish"),
            "begun": (dcp_versions.CheckpointDirectory, "begin_step"),
            "moved": (dcp_versions.CheckpointDirectory, "put_part"),
            "told": (dcp_versions.CheckpointDirectory, "commit"),
            "committed": (dcp_versions, "_delete_older"),
            "half deleted": (dcp_versions.CheckpointDirectory, "delete"),
        }[point]
        setattr(owner, name, die)
    state = {"a": torch.full((4,), 2.0), "b": torch.full((3,), 9.0), "n": 2}
    dcp.save(state, storage_writer=StorageWriter(path))


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("point", "found"),
    [
        pytest.param("written", 1, marks=pytest.mark.slow),
        pytest.param("begun", 1, marks=pytest.mark.slow),
        ("moved", 1),
        pytest.param("told", 1, marks=pytest.mark.slow),
        ("committed", 2),
        pytest.param("half deleted", 2, marks=pytest.mark.slow),
    ],
)
def test_a_killed_save_leaves_the_old_or_the_new_one(
    tmp_path: Path, point: str, found: int
) -> None:
    path = tmp_path / "c"
    with pytest.raises(RankError) as info:
        run_ranks(_killed, 2, str(path), point)
    assert info.value.rank == 0
    for value in (found, 3):
        if value == 3:  # the next save clears everything away
            dcp.save({"a": torch.full((4,), 3.0), "n": 3}, storage_writer=StorageWriter(path))
        state = _load_state_dict_from_keys(storage_reader=StorageReader(path))
        assert state["n"] == value
        assert state["a"].tolist() == [value] * 4
    assert len(list(path.glob("step-*"))) == 1
    assert not list((path / "incoming").iterdir())


def _one_fails(rank: int, world_size: int, path: str) -> list[str]:
    dcp.save({"a": torch.ones(4)}, storage_writer=StorageWriter(path))
    if rank == 1:

        def fail(*args: Any, **options: Any) -> None:
            raise OSError(28, "No space left on device")

        dcp_writer.write_pack = fail
    try:
        dcp.save({"a": torch.zeros(4)}, storage_writer=StorageWriter(path))
    except CheckpointException as e:
        state = {"a": torch.zeros(4)}
        dcp.load(state, storage_reader=StorageReader(path))
        assert state["a"].sum() == 4
        return [f"{r}: {cause[0]}" for r, cause in e.failures.items()]
    return []


def test_a_rank_that_fails_is_named_on_all(tmp_path: Path) -> None:
    told = run_ranks(_one_fails, 2, str(tmp_path / "c"))
    assert told == [["1: [Errno 28] No space left on device"]] * 2


def _mixed(rank: int, world_size: int, path: str) -> str:
    """Rank 0 saves anew after rank 1 has read the metadata of the version before."""
    dcp.save({"a": torch.ones(4)}, storage_writer=StorageWriter(path))

    class Late(StorageReader):
        def read_metadata(self, *args: Any, **options: Any) -> Any:
            if rank == 1:
                found = super().read_metadata()
                dist.barrier()
            else:
                dist.barrier()
                dcp.save({"a": torch.zeros(4)}, storage_writer=StorageWriter(path), no_dist=True)
                found = super().read_metadata()
            return found

    try:
        dcp.load({"a": torch.zeros(4)}, storage_reader=Late(path))
    except CheckpointException as e:
        return str(next(iter(e.failures.values()))[0])
    return "nothing"


def test_ranks_never_load_two_versions(tmp_path: Path) -> None:
    assert all("load again" in text for text in run_ranks(_mixed, 2, str(tmp_path / "c")))
