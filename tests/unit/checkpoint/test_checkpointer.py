"""Saving and loading as a training loop does, with one rank and with several."""

import errno
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from everstep.checkpoint import checkpointer as module
from everstep.checkpoint.ballot import Ballot
from everstep.checkpoint.checkpointer import Checkpointer, StepInfo
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.errors import (
    CheckpointError,
    CollectiveError,
    DirectoryInUseError,
    LayoutError,
    LoadFailedError,
    ManifestError,
    PackTruncatedError,
    SaveFailedError,
    StepExistsError,
    StepNotFoundError,
)
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.lock import DirectoryLock
from everstep.checkpoint.torch_state import State
from tests.support.checkpoints import (
    Counter,
    ThreadCollective,
    bits,
    fresh_state,
    packs,
    run_threads,
    tiny_state,
    train_step,
)


def _names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.name.startswith("step-"))


# One rank


def test_a_run_goes_on_exactly_where_it_was(tmp_path: Path) -> None:
    state = tiny_state(data=Counter(3))
    with Checkpointer(tmp_path / "new" / "checkpoints") as checkpointer:
        assert checkpointer.load(state) == 0
        assert checkpointer.loaded is None
        info = checkpointer.save(5, state)
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
    assert _names(tmp_path) == ["step-00000003-g00001", "step-00000004-g00001"]


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
        assert _names(tmp_path) == ["step-00000001-g00001", "step-00000002-g00002"]
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
        assert checkpointer.save(7, state).generation == 2
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
        assert _names(tmp_path) == ["step-00000001-g00001"]
        checkpointer.save(2, state)


def test_a_directory_that_cannot_be_listed_is_not_left_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tiny_state()
    checkpointer = Checkpointer(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(CheckpointDirectory, "collect_garbage", _no_space)
        with pytest.raises(CheckpointError, match=r"cannot be kept in .*: No space left on device"):
            checkpointer.load(state)
    assert checkpointer.load(state) == 0
    checkpointer.close()


def _no_space(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


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
            full.setattr(os, call, _no_space)
            with pytest.raises(
                SaveFailedError,
                match=r"^saving step 2 failed: rank 0: No space left on device.*untouched: ",
            ) as caught:
                checkpointer.save(2, state)
        assert caught.value.causes.keys() == {0}
        assert isinstance(caught.value.__cause__, OSError)
        assert _names(tmp_path) == ["step-00000001-g00001"]
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
            full.setattr(os, call, _no_space)
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
            broken.setattr(shutil, "rmtree", _no_space)
            with pytest.warns(RuntimeWarning, match="step 2 is saved, but older .* No space left"):
                checkpointer.save(2, state)
        assert checkpointer.steps() == [2]
        checkpointer.save(3, state)
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.load(state)
    assert _names(tmp_path) == ["step-00000003-g00001"]


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


# Several ranks, all holding the same tensors


def _replicated(c: ThreadCollective, root: Path) -> tuple[State, Checkpointer]:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) + 100 * number)
    return State(model=model, data=Counter(c.rank)), Checkpointer(root, collective=c)


def test_replicas_are_shared_out_and_come_back(tmp_path: Path) -> None:
    def run(c: ThreadCollective) -> Any:
        state, checkpointer = _replicated(c, tmp_path)
        with checkpointer:
            checkpointer.load(state)
            info = checkpointer.save(3, state)
            wanted = bits(state)
            with torch.no_grad():
                for parameter in state.model.parameters():
                    parameter.zero_()
            assert checkpointer.load(state) == 4
            assert bits(state) == wanted
            assert state.objects["data"].state_dict() == {"value": 0}
        return info.size_bytes, info.path

    results = run_threads(run, 3)
    assert results == [results[0]] * 3
    sizes = [p.stat().st_size for p in packs(tmp_path)]
    assert len(sizes) == 3
    assert sum(sizes) == results[0][0]
    assert max(sizes) - min(sizes) <= 4 * 4 * 4


def test_a_save_takes_three_exchanges_once_the_layout_is_known(tmp_path: Path) -> None:
    def run(c: ThreadCollective) -> list[str]:
        state, checkpointer = _replicated(c, tmp_path)
        with checkpointer:
            checkpointer.load(state)
            checkpointer.save(1, state)
            known = len(c.tags)
            checkpointer.save(2, state)
            state.model.register_buffer("late", torch.zeros(2))
            checkpointer.save(3, state)
        return c.tags[known:]

    steady = ["captured", "written", "committed"]
    for tags in run_threads(run, 2):
        assert tags == [*steady, "captured", "layouts", "written", "committed"]
    with Checkpointer(tmp_path, read_only=True) as reader:
        manifest = reader.inspect()
        assert manifest is not None
        assert "model.late" in manifest.tensors


@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("point", ["_capture", "_write"])
def test_a_rank_that_fails_fails_all_with_the_same_causes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int, point: str
) -> None:
    real = getattr(Checkpointer, point)
    broken: set[int] = set()

    def act(self: Checkpointer, *args: Any) -> Any:
        if self._collective.rank in broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "/some/disk")
        return real(self, *args)

    def run(c: ThreadCollective) -> Any:
        state, checkpointer = _replicated(c, tmp_path)
        with checkpointer:
            checkpointer.save(1, state)
            c.exchange("ready", b"")
            if c.rank == bad:
                broken.add(bad)
            with pytest.raises(SaveFailedError) as caught:
                checkpointer.save(2, state)
            broken.clear()
            c.exchange("mended", b"")
            left = _names(tmp_path)
            c.exchange("seen", b"")
            checkpointer.save(2, state)
        return caught.value.causes, left

    monkeypatch.setattr(Checkpointer, point, act)
    for causes, left in run_threads(run, 3):
        assert causes == {bad: "Input/output error (/some/disk)"}
        assert left == ["step-00000001-g00001"]
    assert len(_names(tmp_path)) == 2


def test_ranks_that_hold_different_tensors(tmp_path: Path) -> None:
    def run(c: ThreadCollective) -> Any:
        with Checkpointer(tmp_path, collective=c) as checkpointer:
            checkpointer.save(1, State(model=nn.Linear(2, 2 + c.rank)))

    errors = run_threads(run, 2)
    assert all(isinstance(e, SaveFailedError) for e in errors)
    assert all(isinstance(e.__cause__, LayoutError) for e in errors)
    assert "ranks 0, 1: tensor 'model.weight' is F32" in str(errors[0])
    assert not packs(tmp_path)


def test_every_rank_raises_the_same_kind_of_error(tmp_path: Path) -> None:
    def save(c: ThreadCollective) -> None:
        state, checkpointer = _replicated(c, tmp_path)
        with checkpointer:
            checkpointer.save(1, state)

    assert run_threads(save, 2) == [None, None]
    again = run_threads(save, 2)
    assert [type(e) for e in again] == [SaveFailedError] * 2
    assert str(again[0]) == str(again[1])
    with DirectoryLock(tmp_path):
        in_use = run_threads(save, 2)
    assert [type(e) for e in in_use] == [DirectoryInUseError] * 2

    def load_missing(c: ThreadCollective) -> None:
        state, checkpointer = _replicated(c, tmp_path)
        with checkpointer:
            checkpointer.load(state, 5)

    missing = run_threads(load_missing, 2)
    assert [type(e) for e in missing] == [StepNotFoundError] * 2


def test_damage_that_one_rank_finds_fails_all(tmp_path: Path) -> None:
    def run(c: ThreadCollective) -> Any:
        state, checkpointer = _replicated(c, tmp_path)
        with checkpointer:
            checkpointer.save(1, state)
            if c.rank == 0:
                damaged = packs(tmp_path)[1]
                damaged.write_bytes(damaged.read_bytes()[:-1])
            c.exchange("damaged", b"")
            checkpointer.load(state)

    errors = run_threads(run, 2)
    assert all(isinstance(e, LoadFailedError) for e in errors)
    assert errors[0].causes == errors[1].causes
    assert "rank-00001-" in str(errors[1])


def test_a_lost_rank_is_noticed(tmp_path: Path) -> None:
    def run(c: ThreadCollective) -> None:
        state, checkpointer = _replicated(c, tmp_path)
        with checkpointer:
            if c.rank == 0:
                checkpointer.save(1, state)

    errors = run_threads(run, 2)
    assert isinstance(errors[0], CollectiveError)


def test_a_rank_that_hangs_is_named_by_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, awake = Checkpointer._write, threading.Event()
    hanging: set[int] = set()

    def act(self: Checkpointer, *args: Any) -> Any:
        if self._collective.rank in hanging:
            awake.wait(20)
        return real(self, *args)

    def run(c: ThreadCollective) -> Any:
        state, checkpointer = _replicated(c, tmp_path)
        with checkpointer:
            checkpointer.save(1, state)
            hanging.add(1)
            try:
                checkpointer.save(2, state)
            except SaveFailedError as e:
                return e
            finally:
                if c.rank == 2:
                    awake.set()

    monkeypatch.setattr(Checkpointer, "_write", act)
    errors = run_threads(run, 3, timeout_s=1.0)
    assert [type(e) for e in errors] == [SaveFailedError] * 3
    too_late = "it did not say in time that its pack is durable (hung or lost?)"
    for rank in (0, 2):
        assert errors[rank].causes == {1: too_late}
        assert isinstance(errors[rank].__cause__, CollectiveError)
    assert errors[1].causes == {1: f"rank 1 was given up: {too_late}"}
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [1]
        checkpointer._owner.claim()
    assert _names(tmp_path) == ["step-00000001-g00001"]


def test_a_step_that_all_voted_for_is_there_though_rank_0_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    awake = threading.Event()

    def hang(self: Ballot, step_id: StepId) -> None:
        if self._collective.rank == 0:
            awake.wait(20)

    def run(c: ThreadCollective) -> None:
        state, checkpointer = _replicated(c, tmp_path)
        with checkpointer:
            try:
                checkpointer.save(1, state)
            finally:
                if c.rank == 2:
                    awake.set()

    monkeypatch.setattr(Ballot, "_publish", hang)
    errors = run_threads(run, 3, timeout_s=1.0)
    assert [type(e) for e in errors[1:]] == [CollectiveError] * 2
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [1]


def test_a_failure_is_kept_with_the_step_until_it_is_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[Any, ...]] = []
    monkeypatch.setattr(CheckpointDirectory, "put_failure", lambda _, *facts: told.append(facts))
    monkeypatch.setattr(Checkpointer, "_write", _no_space)
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(SaveFailedError):
        checkpointer.save(1, tiny_state())
    assert told == [(StepId(1, 1), 0, "No space left on device")]


# Parts of a state


def test_only_what_is_asked_for_is_loaded(tmp_path: Path) -> None:
    state = tiny_state(data=Counter(3))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    saved = bits(state)
    draws = float(torch.rand(()))

    def load(*include: str) -> tuple[dict[str, bytes], Any, bool]:
        fresh = fresh_state(data=Counter(0))
        with Checkpointer(tmp_path, read_only=True) as reader:
            assert reader.load(fresh, include=include) == 2
            assert reader.loaded is not None
            restored = reader.loaded.rng_restored
        return bits(fresh), fresh.objects["data"].value, restored

    untouched = bits(fresh_state())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found, value, restored = load("model")
    model = {k: v for k, v in saved.items() if k.startswith("model.")}
    assert (found, value, restored) == (model, 0, False)
    found, value, _ = load("objects")
    assert (found, value) == (untouched, 3)
    found, _, _ = load("optimizer")
    assert found == saved | untouched
    assert not torch.equal(torch.get_rng_state(), before)  # fresh_state() seeds
    _, _, restored = load("rng")
    assert restored
    assert float(torch.rand(())) == draws
    found, value, restored = load("model", "optimizer", "objects", "rng")
    assert (found, value, restored) == (saved, 3, True)


@pytest.mark.parametrize("include", [["weights"], [], "model", ["model", "modle"]])
def test_parts_that_there_are_not(tmp_path: Path, include: Any) -> None:
    with pytest.raises(ValueError, match="expected a list of some of model, optimizer"):
        Checkpointer(tmp_path, read_only=True).load(tiny_state(), include=include)


def test_a_model_is_loaded_for_a_run_without_optimizer(tmp_path: Path) -> None:
    state = tiny_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    model = State(model=fresh_state().model)
    with Checkpointer(tmp_path, read_only=True) as reader:
        reader.load(model, include=["model"])
        with pytest.raises(LoadFailedError, match="is not in this run"):
            reader.load(model)
    assert bits(model) == {k: v for k, v in bits(state).items() if k.startswith("model.")}


def test_progress_of_a_load_is_told(tmp_path: Path) -> None:
    seen: list[int] = []
    state = tiny_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        checkpointer.load(state, on_bytes=seen.append)
        manifest = checkpointer.inspect(1)
    assert manifest is not None
    assert seen == sorted(seen)
    assert seen[-1] == manifest.packs[0].data_bytes


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("call", ["open", "write", "fdatasync", "link"])
def test_a_disk_that_fails_one_rank_fails_all_and_keeps_the_step_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    real, failing = getattr(os, call), threading.local()

    def act(*args: Any, **kwargs: Any) -> Any:
        creates = call != "open" or args[1] & os.O_CREAT
        if getattr(failing, "now", False) and creates:
            raise OSError(number, os.strerror(number), str(args[0]) if call == "open" else None)
        return real(*args, **kwargs)

    def run(c: ThreadCollective) -> Any:
        state, checkpointer = _replicated(c, tmp_path)
        with checkpointer:
            checkpointer.save(1, state)
            failing.now = c.rank == 1
            try:
                checkpointer.save(2, state)
            except SaveFailedError as e:
                return e
            finally:
                failing.now = False

    monkeypatch.setattr(os, call, act)
    errors = run_threads(run, 2)
    assert [type(e) for e in errors] == [SaveFailedError] * 2
    assert errors[0].causes == errors[1].causes
    assert list(errors[0].causes) == [1]
    assert os.strerror(number) in str(errors[0])
    assert _names(tmp_path) == ["step-00000001-g00001"]
