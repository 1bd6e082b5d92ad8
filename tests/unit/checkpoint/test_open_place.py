"""What a person may write for a checkpoint, and what is said of everything else."""

import sys
from pathlib import Path

import numpy as np
import pytest
from fsspec.registry import _registry

from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.errors import CheckpointError, StepNotFoundError
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.open_place import PlaceError, find_place, open_place
from tests.support.stored import save_arrays


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with the steps 3 and 5."""
    directory = CheckpointDirectory(tmp_path / "run" / "checkpoints")
    directory.create_generation(None, {"rank": 1})
    for step in (3, 5):
        save_arrays(directory, StepId(1, step), {"model.w": np.full(4, step, np.float32)})
    return tmp_path / "run"


def test_a_step_is_found_by_run_directory_checkpoints_or_itself(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = run / "checkpoints"
    for place, step in (
        (run, 5),
        (f"{run}/", 5),
        (f"{run}@3", 3),
        (f"file://{checkpoints}@3", 3),
        (checkpoints, 5),
        (checkpoints / "step-00000003-g00001", 3),
    ):
        with open_place(place).open() as reader:
            assert reader.manifest.step == step
            assert reader.where.endswith(f"/run/checkpoints/step-{step:08d}-g00001")
    monkeypatch.chdir(checkpoints / "step-00000003-g00001")
    for here, newest in ((".", 3), ("..", 5), ("../..", 5)):
        assert open_place(here).chosen().step == newest
    assert open_place(run, 3).chosen() == StepId(1, 3)


def test_what_is_no_place_is_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(StepNotFoundError):
        open_place(f"{run}@4").chosen()
    for text, step, words in (
        (f"{run}@3", 5, "asks for another step than --step 5"),
        (str(run / "checkpoints" / "step-00000003-g00001"), 5, "is the directory of step 3"),
        (str(tmp_path), None, "holds no checkpoints"),
        (str(run / "none"), None, "is not a directory"),
        ("memory://nothing/there", None, "holds no checkpoints"),
    ):
        with pytest.raises(PlaceError, match=words):
            open_place(text, step)
    new = tmp_path / "new" / "checkpoints"
    new.mkdir(parents=True)
    for place in (new, new.parent):
        with pytest.raises(PlaceError, match="has no checkpoint yet"):
            open_place(place).chosen()


def test_folders_of_others_are_no_places(tmp_path: Path) -> None:
    theirs = tmp_path / "checkpoints"
    theirs.mkdir()
    (theirs / "model.safetensors").touch()
    for path in (theirs, theirs / "model.safetensors", tmp_path / "none"):
        assert find_place(path) is None


def test_a_url_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(_registry, "s3", raising=False)  # imported by another test
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(CheckpointError, match="everstep\\[s3\\]"):
        find_place("s3://bucket/run")
