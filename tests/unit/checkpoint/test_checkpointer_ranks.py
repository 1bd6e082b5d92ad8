"""Several ranks that hold the same tensors: they share the work, and fail together."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from everstep.checkpoint.ballot import Ballot
from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.durable_save import DurableSave
from everstep.checkpoint.errors import (
    CollectiveError,
    DirectoryInUseError,
    LayoutError,
    LoadFailedError,
    SaveFailedError,
    StepNotFoundError,
)
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.lock import DirectoryLock
from everstep.checkpoint.torch_state import State
from tests.support.checkpoints import (
    Counter,
    ThreadCollective,
    bits,
    no_space,
    packs,
    run_threads,
    step_names,
    tiny_state,
)


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
            info = checkpointer.save(3, state).durable.result()
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
    real = getattr(DurableSave, point)
    broken: set[int] = set()

    def act(self: DurableSave, *args: Any) -> Any:
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
            left = step_names(tmp_path)
            c.exchange("seen", b"")
            checkpointer.save(2, state)
        return caught.value.causes, left

    monkeypatch.setattr(DurableSave, point, act)
    for causes, left in run_threads(run, 3):
        assert causes == {bad: "Input/output error (/some/disk)"}
        assert left == ["step-00000001-g00001"]
    assert len(step_names(tmp_path)) == 2


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
    real, awake = DurableSave._write, threading.Event()
    hanging: set[int] = set()

    def act(self: DurableSave, *args: Any) -> Any:
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

    monkeypatch.setattr(DurableSave, "_write", act)
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
    assert step_names(tmp_path) == ["step-00000001-g00001"]


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
    monkeypatch.setattr(DurableSave, "_write", no_space)
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(SaveFailedError):
        checkpointer.save(1, tiny_state())
    assert told == [(StepId(1, 1), 0, "No space left on device")]


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
    assert step_names(tmp_path) == ["step-00000001-g00001"]
