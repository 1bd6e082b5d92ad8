"""The whole life of checkpoints in stores without files: memory, and S3 with a real server."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.errors import (
    BlockChecksumError,
    CheckpointError,
    DirectoryInUseError,
    LoadFailedError,
    PackTruncatedError,
    SaveFailedError,
    StepExistsError,
)
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.store import Store
from everstep.checkpoint.store_fsspec import FsspecStore
from everstep.checkpoint.store_memory import MemoryStore
from everstep.checkpoint.torch_collective import ProcessGroupCollective
from everstep.checkpoint.torch_state import State
from tests.support.checkpoints import (
    Counter,
    ThreadCollective,
    bits,
    fresh_state,
    run_threads,
    tiny_state,
    train_step,
)
from tests.support.s3_server import S3Server
from tests.support.spawn import run_ranks


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
    if request.param == "memory":
        return MemoryStore()
    server: S3Server = request.getfixturevalue("s3")
    return FsspecStore(server.new_url(), server.options)


SLOW_ON_S3 = pytest.mark.parametrize(
    "store", ["memory", pytest.param("s3", marks=pytest.mark.slow)], indirect=True
)
"""For tests that the whole life on S3 covers nearly."""


def _steps(store: Store) -> list[str]:
    return [name for name in store.list() if name.startswith("step-")]


def test_a_run_goes_on_exactly_where_it_was(store: Store) -> None:
    state = tiny_state(data=Counter(3))
    with Checkpointer(store, keep=2) as checkpointer:
        assert checkpointer.load(state) == 0
        for step in (3, 4, 5):
            info = checkpointer.save(step, state).durable.result()
        assert info.path == store.describe("step-00000005-g00001")
        assert checkpointer.steps() == [4, 5]
    train_step(state)
    resumed, seen = fresh_state(data=Counter()), list[int]()
    with Checkpointer(store, keep=2) as checkpointer:
        assert checkpointer.load(resumed, on_bytes=seen.append) == 6
        train_step(resumed)
        assert bits(resumed) == bits(state)
        assert resumed.objects["data"].state_dict() == {"value": 3}
        assert checkpointer.save(6, resumed).durable.result().generation == 2
    assert seen == sorted(seen)
    assert seen[-1] > 0
    assert _steps(store) == ["step-00000005-g00001", "step-00000006-g00002"]
    assert not any("leases" in store.list(step) for step in _steps(store))


def test_of_two_jobs_that_go_on_from_one_step_one_wins(store: Store) -> None:
    state = tiny_state()
    with Checkpointer(store) as first:
        first.save(1, state)
    one, other = Checkpointer(store), Checkpointer(store)
    assert one.load(state) == other.load(state) == 2
    one.save(2, state)
    with pytest.raises(SaveFailedError, match=r"process \d+ on .* has begun generation 2") as lost:
        other.save(2, state)
    assert isinstance(lost.value.__cause__, DirectoryInUseError)
    assert one.steps() == [1, 2]
    one.save(3, state)
    with pytest.raises(StepExistsError):
        one.save(3, state)
    assert CheckpointDirectory(store).committed() == [StepId(1, 1), StepId(2, 2), StepId(2, 3)]


@SLOW_ON_S3
def test_two_jobs_that_begin_at_once(store: Store) -> None:
    state = tiny_state()

    def job(c: ThreadCollective) -> str:
        checkpointer = Checkpointer(store)
        checkpointer.load(state)
        c.exchange("loaded", b"")
        try:
            checkpointer.save(1, state)
        except SaveFailedError as e:
            return type(e.__cause__).__name__
        return "won"

    assert sorted(run_threads(job, 3)) == ["DirectoryInUseError"] * 2 + ["won"]
    assert CheckpointDirectory(store).lineage() == [StepId(1, 1)]


@SLOW_ON_S3
def test_a_job_whose_directory_was_taken_over_stops(store: Store) -> None:
    state = tiny_state()
    old = Checkpointer(store, keep=1)
    for step in (1, 2):
        old.save(step, state)
    heir = Checkpointer(store, keep=1)
    heir.load(state)
    heir.save(3, state)
    with pytest.raises(SaveFailedError, match=r"has begun generation 2.*another directory"):
        old.save(3, state)
    assert heir.steps() == [3]
    heir.save(4, state)
    assert CheckpointDirectory(store).committed() == [StepId(2, 4)]


@SLOW_ON_S3
def test_damage_is_named(store: Store) -> None:
    state = tiny_state()
    with Checkpointer(store) as checkpointer:
        checkpointer.save(1, state)
        (pack,) = (n for n in store.list("step-00000001-g00001") if n.startswith("rank"))
        key = f"step-00000001-g00001/{pack}"
        whole = store.read(key)
        manifest = checkpointer.inspect()
        assert manifest is not None
        at = manifest.packs[0].data_start + 10
        for data, kind in (
            (whole[:-1], PackTruncatedError),
            (whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], BlockChecksumError),
            (None, PackTruncatedError),
        ):
            store.delete(key)
            if data is not None:
                store.put(key, data)
            with pytest.raises(LoadFailedError, match=rf"{pack} is damaged") as caught:
                checkpointer.load(state)
            assert isinstance(caught.value.__cause__, kind)


# Several processes, and S3


def _model(rank: int, world_size: int) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(700, 1000), nn.Linear(1000, 300), nn.Linear(300, 7))
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    return model


def _full(model: nn.Module) -> dict[str, bytes]:
    return {
        name: tensor.full_tensor().detach().numpy().tobytes()
        for name, tensor in model.state_dict().items()
    }


def _save_sharded(rank: int, world_size: int, url: str, options: dict[str, Any]) -> Any:
    model = _model(rank, world_size)
    collective = ProcessGroupCollective(timeout_s=60)
    with Checkpointer(url, collective=collective, storage_options=options) as checkpointer:
        checkpointer.load(State(model=model))
        checkpointer.save(7, State(model=model))
    return _full(model)


def _load_sharded(rank: int, world_size: int, url: str, options: dict[str, Any]) -> Any:
    model = _model(rank, world_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    collective = ProcessGroupCollective(timeout_s=60)
    with Checkpointer(url, collective=collective, storage_options=options) as checkpointer:
        assert checkpointer.load(State(model=model)) == 8
        checkpointer.save(8, State(model=model))
    return _full(model)


@pytest.mark.multiproc
def test_the_whole_life_on_s3(s3: S3Server) -> None:
    url = s3.new_url()
    saved = run_ranks(_save_sharded, 3, url, s3.options)
    loaded = run_ranks(_load_sharded, 2, url, s3.options)
    assert loaded == [saved[0]] * 2
    directory = CheckpointDirectory(FsspecStore(url, s3.options))
    assert directory.lineage() == [StepId(1, 7), StepId(2, 8)]
    manifest = directory.manifest(StepId(2, 8))
    assert (manifest.lineage, len(manifest.packs)) == ((1, 7), 2)
    with directory.reader(StepId(2, 8)) as reader:
        for pack in range(2):
            reader.verify(pack)
        weight = reader.read("model.1.weight")
    assert weight.tobytes() == saved[0]["1.weight"]
    half = StepId(1, 9)
    directory.put_failure(half, 0, "a job that is gone")
    assert directory.collect_garbage() == []
    assert directory.collect_garbage(grace_s=0.0) == [half]
    with pytest.raises(CheckpointError, match="is not a local folder"):
        directory.step_path(half)


def _hang(rank: int, world_size: int, root: Path) -> tuple[str, float]:
    """Rank 1 sleeps while it should write; what each rank is told, and when."""
    state = State(model=nn.Linear(4, 4))
    with Checkpointer(root, collective=ProcessGroupCollective(timeout_s=3)) as checkpointer:
        checkpointer.save(1, state)
        if rank == 1:
            checkpointer._write = lambda *_: time.sleep(6)  # type: ignore[method-assign]
        begun_s = time.monotonic()
        try:
            checkpointer.save(2, state)
        except CheckpointError as e:
            return str(e), time.monotonic() - begun_s
    return "", 0.0


@pytest.mark.slow
@pytest.mark.multiproc
def test_a_rank_that_hangs_is_named_at_the_deadline(tmp_path: Path) -> None:
    told = run_ranks(_hang, 3, tmp_path, timeout_s=60)
    for rank in (0, 2):
        text, waited_s = told[rank]
        assert "saving step 2 failed: rank 1: it did not say in time" in text
        assert waited_s < 20
    assert told[1][0]
    with Checkpointer(tmp_path, read_only=True) as reader:
        assert reader.steps() == [1]
