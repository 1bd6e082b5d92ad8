"""Saving and loading as a training loop does, with one rank."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from everstep.checkpoint import state_capture as module
from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.errors import (
    CheckpointError,
    DirectoryInUseError,
    LoadFailedError,
    ManifestError,
    PackTruncatedError,
    SaveFailedError,
    StepExistsError,
    StepNotFoundError,
)
from everstep.checkpoint.snapshots.handle import StepInfo
from tests.support.checkpoints import (
    Counter,
    bits,
    fresh_state,
    no_space,
    packs,
    step_names,
    tiny_state,
    train_step,
)


def test_a_run_goes_on_exactly_where_it_was(tmp_path: Path) -> None:
    state = tiny_state(data=Counter(3))
    with Checkpointer(tmp_path / "new" / "checkpoints") as checkpointer:
        assert checkpointer.load(state) == 0
        assert checkpointer.loaded is None
        info = checkpointer.save(5, state).durable.result()
        assert info.path.endswith("checkpoints/step-00000005-g00001")
        assert info.size_bytes == sum(p.stat().st_size for p in packs(Path(info.path).parent))
    train_step(state)
    resumed = fresh_state(data=Counter())
    with Checkpointer(tmp_path / "new" / "checkpoints") as checkpointer:
        assert checkpointer.load(resumed) == 6
        assert isinstance(checkpointer.loaded, StepInfo)
        assert (checkpointer.loaded.step, checkpointer.loaded.rng_restored) == (5, True)
    train_step(resumed)
    assert bits(resumed) == bits(state)
    assert resumed.objects["data"].state_dict() == {"value": 3}


def test_every_save_holds_its_own_step(tmp_path: Path) -> None:
    state, wanted = tiny_state(), {}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.load(state)
        for step in (1, 2, 3):
            checkpointer.save(step, state)
            wanted[step] = bits(state)
            train_step(state)
        assert checkpointer.steps() == [1, 2, 3]
        assert checkpointer.latest() == 3
        for step in (2, 1, 3):
            checkpointer.load(state, step)
            assert bits(state) == wanted[step]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    state = tiny_state()
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step in range(5):
            checkpointer.save(step, state)
    assert step_names(tmp_path) == ["step-00000003-g00001", "step-00000004-g00001"]


def test_resuming_from_an_earlier_step_forks(tmp_path: Path) -> None:
    state = tiny_state()
    with Checkpointer(tmp_path, keep=9) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, state)
    with Checkpointer(tmp_path, keep=9) as checkpointer:
        assert checkpointer.load(state, 1) == 2
        assert checkpointer.steps() == [1, 2, 3]
        train_step(state)
        wanted = bits(state)
        checkpointer.save(2, state)
        assert checkpointer.steps() == [1, 2]
        assert step_names(tmp_path) == ["step-00000001-g00001", "step-00000002-g00002"]
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.load(state)
        assert bits(state) == wanted
        with pytest.raises(StepNotFoundError, match="no checkpoint of step 3; it has: 1, 2"):
            checkpointer.load(state, 3)


def test_saving_where_an_earlier_run_saved_is_refused(tmp_path: Path) -> None:
    state = tiny_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(7, state)
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(SaveFailedError, match=r"earlier run, up to step 7: load\(\) one"):
            checkpointer.save(8, state)
        assert checkpointer.steps() == [7]
        assert len(list((tmp_path / "generations").iterdir())) == 1


def test_steps_ascend_and_are_saved_once(tmp_path: Path) -> None:
    state = tiny_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(7, state)
        before = (tmp_path / "step-00000007-g00001" / "manifest.json").read_bytes()
        with pytest.raises(StepExistsError, match=r"step-00000007-g00001 exists: .* later step"):
            checkpointer.save(7, state)
        with pytest.raises(CheckpointError, match="step 6 cannot be saved after step 7"):
            checkpointer.save(6, state)
        assert (tmp_path / "step-00000007-g00001" / "manifest.json").read_bytes() == before
        checkpointer.load(state)
        assert checkpointer.save(7, state).durable.result().generation == 2
        checkpointer.load(state)
        with pytest.raises(CheckpointError, match="step 3 cannot be saved"):
            checkpointer.save(3, state)
    with Checkpointer(tmp_path / "b") as checkpointer, pytest.raises(CheckpointError, match="-2"):
        checkpointer.save(-2, state)


def test_two_jobs_in_one_directory(tmp_path: Path) -> None:
    state = tiny_state()
    with Checkpointer(tmp_path) as first, Checkpointer(tmp_path) as second:
        first.save(1, state)
        for act in (lambda: second.save(2, state), lambda: second.load(state)):
            with pytest.raises(DirectoryInUseError, match=f"process {os.getpid()} on"):
                act()
        first.close()
        assert second.load(state) == 2


def test_a_directory_opened_read_only(tmp_path: Path) -> None:
    state = tiny_state()
    with Checkpointer(tmp_path) as writer, Checkpointer(tmp_path, read_only=True) as reader:
        assert reader.load(state) == 0
        writer.save(1, state)
        assert reader.load(state) == 2
        manifest = reader.inspect()
        assert manifest is not None
        assert (manifest.step, manifest.mesh) == (1, {"rank": 1})
        assert "model.0.weight" in manifest.tensors
        with pytest.raises(CheckpointError, match="opened read-only"):
            reader.save(2, state)


def test_inspecting_nothing(tmp_path: Path) -> None:
    assert Checkpointer(tmp_path).inspect() is None
    assert list(tmp_path.iterdir()) == []


def test_half_written_steps_are_cleared_away(tmp_path: Path) -> None:
    state = tiny_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    shutil.copytree(tmp_path / "step-00000001-g00001", tmp_path / "step-00000002-g00001")
    (tmp_path / "step-00000002-g00001" / "manifest.json").unlink()
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.load(state) == 2
        assert step_names(tmp_path) == ["step-00000001-g00001"]
        checkpointer.save(2, state)


def test_a_directory_that_cannot_be_listed_is_not_left_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tiny_state()
    checkpointer = Checkpointer(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(CheckpointDirectory, "collect_garbage", no_space)
        with pytest.raises(CheckpointError, match=r"cannot be kept in .*: No space left on device"):
            checkpointer.load(state)
    assert checkpointer.load(state) == 0
    checkpointer.close()


@pytest.mark.parametrize("call", ["write", "fdatasync", "fsync", "link"])
def test_a_full_disk_fails_the_save_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    state = tiny_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        wanted = bits(state)
        train_step(state)
        with monkeypatch.context() as full:
            full.setattr(os, call, no_space)
            with pytest.raises(
                SaveFailedError,
                match=r"^saving step 2 failed: rank 0: No space left on device.*untouched: ",
            ) as caught:
                checkpointer.save(2, state)
        assert caught.value.causes.keys() == {0}
        assert isinstance(caught.value.__cause__, OSError)
        assert step_names(tmp_path) == ["step-00000001-g00001"]
        assert checkpointer.load(state) == 2
        assert bits(state) == wanted
        checkpointer.save(2, state)
        assert checkpointer.steps() == [1, 2]


@pytest.mark.parametrize("call", ["write", "fsync", "link", "mkdir"])
def test_a_disk_that_is_full_from_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    state = tiny_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.load(state)
        with monkeypatch.context() as full:
            full.setattr(os, call, no_space)
            with pytest.raises(SaveFailedError, match="rank 0: No space left on device"):
                checkpointer.save(1, state)
        checkpointer.save(1, state)
        assert checkpointer.steps() == [1]


def test_checkpoints_that_cannot_be_deleted_do_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tiny_state()
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, state)
        with monkeypatch.context() as broken:
            broken.setattr(shutil, "rmtree", no_space)
            with pytest.warns(RuntimeWarning, match="step 2 is saved, but older .* No space left"):
                checkpointer.save(2, state)
        assert checkpointer.steps() == [2]
        checkpointer.save(3, state)
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.load(state)
    assert step_names(tmp_path) == ["step-00000003-g00001"]


def test_damage_is_named_with_the_way_out(tmp_path: Path) -> None:
    state = tiny_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        checkpointer.save(2, state)
        packs(tmp_path)[1].unlink()
        with pytest.raises(
            LoadFailedError,
            match=r"step 2 failed: rank 0: .*step-00000002-g00001/rank-00000-\w+\.safetensors is "
            r"damaged: the file is missing\. Other checkpoints .*: 1; resume from .* --resume STEP",
        ) as caught:
            checkpointer.load(state)
        assert isinstance(caught.value.__cause__, PackTruncatedError)
        assert checkpointer.load(state, 1) == 2


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    state = tiny_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        (tmp_path / "step-00000001-g00001" / "manifest.json").write_text("{}")
        with pytest.raises(LoadFailedError, match=r"manifest\.json is damaged") as caught:
            checkpointer.load(state)
    assert isinstance(caught.value.__cause__, ManifestError)


def test_arguments_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep=0"):
        Checkpointer(tmp_path, keep=0)
    for mesh, coordinate in [({"dp": 2}, {"dp": 0}), ({"dp": 1}, {"tp": 0}), ({"dp": 1}, None)]:
        with pytest.raises(ValueError, match="do not name one place for each of 1 ranks"):
            Checkpointer(tmp_path, mesh=mesh, coordinate=coordinate)


def test_generators_of_another_mesh_are_derived(tmp_path: Path) -> None:
    state = tiny_state()
    with Checkpointer(tmp_path, mesh={"a": 1}, coordinate={"a": 0}) as checkpointer:
        checkpointer.save(1, state)
    numbers = []
    for seed in (5, 5, 6):
        with Checkpointer(tmp_path, mesh={"b": 1}, coordinate={"b": 0}, seed=seed) as checkpointer:
            checkpointer.load(state)
            assert checkpointer.loaded is not None
            assert not checkpointer.loaded.rng_restored
        numbers.append((float(torch.rand(())), float(np.random.random())))
    assert numbers[0] == numbers[1] != numbers[2]


def test_generators_of_another_size_are_derived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tiny_state()
    with Checkpointer(tmp_path) as checkpointer:
        with monkeypatch.context() as other:
            other.setattr(module, "rng_states", lambda: {"torch_cpu": torch.zeros(7).byte()})
            checkpointer.save(1, state)
        checkpointer.load(state)
        assert checkpointer.loaded is not None
        assert not checkpointer.loaded.rng_restored


def test_progress_is_told(tmp_path: Path) -> None:
    seen: list[int] = []
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, tiny_state(), on_bytes=seen.append)
        manifest = checkpointer.inspect(1)
    assert manifest is not None
    assert seen[-1] == manifest.packs[0].data_bytes
