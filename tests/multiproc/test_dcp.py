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
from torch.distributed.checkpoint import (
    FileSystemReader,
    FileSystemWriter,
    _async_process_executor,
)
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

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.convert.dcp import export_dcp, import_dcp
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.step_reader import StepReader
from everstep.checkpoint.torch_collective import ProcessGroupCollective
from everstep.checkpoint.torch_state import State
from everstep.checkpoint.views import dcp_versions, dcp_writer
from everstep.checkpoint.views.dcp import LoadPlanner, SavePlanner, StorageReader, StorageWriter
from tests.support.spawn import RankError, run_ranks

pytestmark = [
    pytest.mark.multiproc,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:torch.distributed is "),
]


class Uneven(nn.Module):
    """A column-parallel and a row-parallel matrix whose sizes nothing divides."""

    def __init__(self, n: int, tp: Any) -> None:
        super().__init__()
        for name, dim in (("columns", 0), ("rows", 1)):
            whole, mine = _numbered(n), tp.get_local_rank()
            pieces = whole.chunk(tp.size(), dim)
            local = pieces[mine] if mine < len(pieces) else whole.narrow(dim, 0, 0)
            sharded = DTensor.from_local(
                local.contiguous(),
                tp,
                [Shard(dim)],
                run_check=False,
                shape=whole.shape,
                stride=whole.stride(),
            )
            self.register_parameter(name, nn.Parameter(sharded))


def _numbered(n: int) -> torch.Tensor:
    return torch.arange(float(n * n)).reshape(n, n)


def _uneven(
    rank: int, world_size: int, root: str, sizes: tuple[int, ...], tp_size: int, save: bool
) -> list[str]:
    """Save, or load into zeros and compare; what DCP's own planner says of it."""
    mesh = init_device_mesh("cpu", (world_size // tp_size, tp_size), mesh_dim_names=("dp", "tp"))
    refused = []
    for n in sizes:
        path = f"{root}/{n}"
        model = Uneven(n, mesh["tp"])
        fully_shard(model, mesh=mesh["dp"])
        state = model.state_dict()
        if save:
            try:
                dcp.save(state, storage_writer=StorageWriter(path))
            except CheckpointException as e:
                refused += [str(cause[0]) for cause in e.failures.values()]
            dcp.save(state, storage_writer=StorageWriter(path), planner=SavePlanner())
            continue
        shards = {name: tensor.to_local().clone() for name, tensor in state.items()}
        for tensor in state.values():
            tensor.to_local().zero_()
        dcp.load(state, storage_reader=StorageReader(path), planner=LoadPlanner())
        for name, shard in shards.items():
            assert torch.equal(state[name].to_local(), shard), (n, name)
    return refused


def test_uneven_tensor_parallelism(tmp_path: Path) -> None:
    """DCP's planner refuses 13 rows on dp3 x tp2, and would mis-save 7; ours keep both right."""
    refused = run_ranks(_uneven, 6, str(tmp_path), (13, 7), 2, True)[0]
    assert any("overlapping" in text for text in refused)
    run_ranks(_uneven, 2, str(tmp_path), (13, 7), 2, False)
    found = _load_state_dict_from_keys(storage_reader=StorageReader(tmp_path / "7"))
    assert torch.equal(found["rows"], _numbered(7))


@pytest.mark.slow
def test_many_uneven_sizes(tmp_path: Path) -> None:
    sizes = (1, 2, 3, 5, 10, 13, 64, 101)
    run_ranks(_uneven, 8, str(tmp_path), sizes, 2, True)
    for ranks, tp in ((8, 2), (6, 2), (3, 1), (3, 3)):
        run_ranks(_uneven, ranks, str(tmp_path), sizes, tp, False)


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


def _train_and_save(rank: int, world_size: int, path: str, shards: int, ours: bool) -> Any:
    model, optimizer = _trained(world_size, shards, 1, 2)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    writer = (StorageWriter if ours else FileSystemWriter)(path)
    dcp.save({**states, "epoch": 3, "mask": {1, 2}}, storage_writer=writer)
    return _full(states)


def _load_trained(rank: int, world_size: int, path: str, shards: int, ours: bool) -> Any:
    model, optimizer = _trained(world_size, shards, 0, 1)
    states: dict[str, Any] = dict(
        zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)
    )
    states |= {"epoch": 0, "mask": None}
    dcp.load(states, storage_reader=(StorageReader if ours else FileSystemReader)(path))
    assert (states.pop("epoch"), states.pop("mask")) == (3, {1, 2})
    set_state_dict(
        model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"]
    )
    again = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    return _full(again)


def test_a_run_of_another_trainer_moves_from_four_ranks_to_two(tmp_path: Path) -> None:
    """HSDP 2 x 2 to FSDP2 on 2; model and optimizer as DCP users hold them."""
    saved = run_ranks(_train_and_save, 4, str(tmp_path / "c"), 2, True)
    loaded = run_ranks(_load_trained, 2, str(tmp_path / "c"), 2, True)
    assert saved[0]["optimizer"]["state"]
    assert all(found == saved[0] for found in (*saved, *loaded))


@pytest.mark.slow
def test_a_plain_checkpoint_of_four_ranks_goes_through_our_format_to_two(tmp_path: Path) -> None:
    saved = run_ranks(_train_and_save, 4, str(tmp_path / "plain"), 2, False)
    import_dcp(tmp_path / "plain", tmp_path / "ours")
    ours = run_ranks(_load_trained, 2, str(tmp_path / "ours"), 2, True)
    directory = dcp_versions.CheckpointDirectory(tmp_path / "ours")
    with StepReader(directory.step_path(StepId(1, 0)), directory.manifest(StepId(1, 0))) as reader:
        assert len(reader.manifest.packs) > 1
        export_dcp(reader, tmp_path / "back", piece_bytes=50)
    back = run_ranks(_load_trained, 2, str(tmp_path / "back"), 2, False)
    assert all(found == saved[0] for found in (*saved, *ours, *back))


def _run_saves(rank: int, world_size: int, path: str) -> Any:
    model, optimizer = _trained(world_size, world_size, 1, 2)
    with Checkpointer(path, collective=ProcessGroupCollective()) as run:
        run.save(5, State(model=model, optimizer=optimizer))
    return _full(model.state_dict())


def _dcp_loads(rank: int, world_size: int, path: str) -> Any:
    model, _ = _trained(world_size, world_size, 0, 0)
    state: dict[str, Any] = {"model": model.state_dict()}
    dcp.load(state, storage_reader=StorageReader(path))
    moment = "optimizer.2.weight.exp_avg"
    found = {moment: torch.zeros(3, 7)}
    dcp.load(found, storage_reader=StorageReader(path))
    assert found[moment].any()
    return _full(model.state_dict())


def test_a_run_of_ours_is_loaded_by_dcp_on_other_ranks(tmp_path: Path) -> None:
    saved = run_ranks(_run_saves, 3, str(tmp_path / "run"))
    assert run_ranks(_dcp_loads, 2, str(tmp_path / "run")) == saved[:2]


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
