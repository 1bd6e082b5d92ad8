"""A run with several attempts, and ``everstep ckpt`` to look at it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.lineage import StepId
from everstep.cli import main
from tests.support.stored import Array, save_arrays


def arrays(value: float = 1.0) -> dict[str, Array]:
    return {
        "model.w": np.full((6, 4), value, np.float32),
        "model.b": np.arange(5),
        "rng.rank0.x": np.arange(9, dtype=np.uint8),
    }


def save(run: Path, step_id: StepId, value: float = 1.0, **options: Any) -> None:
    save_arrays(
        CheckpointDirectory(run / "checkpoints"),
        step_id,
        arrays(value),
        objects={"object.data": {"value": {"position": step_id.step}}},
        **options,
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 10, 20, 30 of one attempt; one that went on from 20, saved 40, and began 50."""
    run = tmp_path / "run"
    directory = CheckpointDirectory(run / "checkpoints")
    directory.create_generation(None, {"rank": 1})
    for step in (10, 20, 30):
        save(run, StepId(1, step), float(step))
    directory.create_generation(StepId(1, 20), {"rank": 3}, now_s=1e9)
    save(run, StepId(2, 40), 40.0, bounds={"model.w": [(2, 4), ()]}, world_size=3)
    half = directory.begin_step(StepId(2, 50))
    (half / "rank-00000-aa.safetensors").write_bytes(bytes(100))
    return run


class Ckpt:
    """The commands, called in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str | Path, code: int = 0) -> str:
        """What a command prints; its exit code has to be this."""
        with pytest.raises(SystemExit) as ended:
            main(["ckpt", *map(str, arguments)])
        captured = self._capsys.readouterr()
        self.errors = captured.err
        assert int(ended.value.code or 0) == code, captured.out + captured.err
        return captured.out

    def json(self, *arguments: str | Path, code: int = 0) -> Any:
        """What it prints as JSON."""
        return json.loads(self(*arguments, "--json", code=code))


@pytest.fixture
def ckpt(capsys: pytest.CaptureFixture[str]) -> Ckpt:
    return Ckpt(capsys)


def manifest_of(run: Path, step_id: StepId) -> Path:
    return CheckpointDirectory(run / "checkpoints").step_path(step_id) / "manifest.json"


def spoil(path: Path, at: int = 30) -> None:
    """Flip a bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
