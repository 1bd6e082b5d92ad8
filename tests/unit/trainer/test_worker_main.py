"""Device and checkpoint place of a rank; the rest of its work is tested by the command line."""

from pathlib import Path

import pytest
import torch

from everstep.trainer.checkpoint_place import checkpoint_place
from everstep.trainer.config import ParallelConfig, RunConfig, TrainConfig
from everstep.trainer.errors import ConfigError
from everstep.trainer.rank_spec import RankSpec
from everstep.trainer.worker_main import _choose_device


def choose(device: str, *, gpus_seen: int, reserved: str | None, monkey: pytest.MonkeyPatch) -> str:
    monkey.setattr(torch.cuda, "device_count", lambda: gpus_seen)
    config = RunConfig(train=TrainConfig(steps=1), parallel=ParallelConfig(device=device))
    spec = RankSpec(
        config_yaml="",
        run_dir="r",
        rank=3,
        world_size=4,
        local_rank=3,
        local_world_size=4,
        attempt=0,
        resume="auto",
        store=None,
        device=reserved,
    )
    return str(_choose_device(config, spec))


@pytest.mark.parametrize(
    ("device", "gpus_seen", "reserved", "chosen"),
    [
        ("auto", 8, None, "cuda:3"),
        ("auto", 1, None, "cpu"),
        ("cpu", 8, None, "cpu"),
        # Ray shows each rank the one GPU that it has reserved for it, as its first
        ("auto", 1, "cuda:0", "cuda:0"),
        ("cuda", 1, "cuda:0", "cuda:0"),
        # and may show GPUs to ranks that have none reserved
        ("auto", 8, "cpu", "cpu"),
    ],
)
def test_the_device_of_a_rank(
    device: str,
    gpus_seen: int,
    reserved: str | None,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choose(device, gpus_seen=gpus_seen, reserved=reserved, monkey=monkeypatch) == chosen


def test_cuda_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="this host has 1"):
        choose("cuda", gpus_seen=1, reserved=None, monkey=monkeypatch)


@pytest.mark.parametrize(
    ("directory", "place"),
    [
        (None, Path("runs/a/checkpoints")),
        ("elsewhere", Path("runs/a/elsewhere")),
        ("/big/disk", Path("/big/disk")),
        ("s3://bucket/a", "s3://bucket/a"),
    ],
)
def test_where_checkpoints_live(directory: str | None, place: Path | str) -> None:
    expected = place if isinstance(place, str) else place.absolute()
    assert checkpoint_place(Path("runs/a"), directory) == expected
