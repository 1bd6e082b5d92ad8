"""The directory: what is committed, forked, deleted, refused."""

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.errors import (
    CheckpointError,
    LayoutError,
    ManifestError,
    SaveFailedError,
    StepExistsError,
    StepNotFoundError,
)
from everstep.checkpoint.layout import Box, Fragment, TensorSpec
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.manifest import Part, decode_part, encode_part
from everstep.checkpoint.pack import StridedBytes, plan_pack, write_pack

Lineage = dict[str, int | None]
SPEC = TensorSpec("model.w", "U8", (4,))
HALVES = [Fragment(SPEC, Box((0,), (2,))), Fragment(SPEC, Box((2,), (2,)))]


def _put_part(
    directory: CheckpointDirectory, step_id: StepId, rank: int, lineage: Lineage | None = None
) -> Part:
    import numpy as np

    path = directory.begin_step(step_id)
    record = write_pack(
        path / f"rank-{rank:05d}-aa.safetensors",
        plan_pack(rank, [HALVES[rank]]),
        lambda f: StridedBytes(np.full(2, rank, dtype=np.uint8), 0, (1,)),
    )
    context = {"mesh": {"dp": 2}, "producer": {}, "objects": {}, "lineage": lineage or {}}
    part = Part(
        generation=step_id.generation,
        step=step_id.step,
        rank=rank,
        world_size=2,
        pack=record,
        fragments=(HALVES[rank],),
        context=context if rank == 0 else {},
    )
    directory.put_part(part)
    return part


def _save(
    directory: CheckpointDirectory, generation: int, *steps: int, lineage: Lineage | None = None
) -> list[StepId]:
    step_ids = [StepId(generation, step) for step in steps]
    for step_id in step_ids:
        for rank in range(2):
            _put_part(directory, step_id, rank, lineage)
        directory.commit(step_id, 2)
    return step_ids


@pytest.fixture
def directory(tmp_path: Path) -> CheckpointDirectory:
    return CheckpointDirectory(tmp_path / "checkpoints")


def test_nothing_there(directory: CheckpointDirectory) -> None:
    assert directory.committed() == directory.lineage() == directory.collect_garbage() == []
    assert directory.find(None) is None
    with pytest.raises(StepNotFoundError, match="no checkpoint of step 3; it has: none"):
        directory.find(3)
    assert not directory.root.exists()


def test_a_step_exists_once_its_manifest_does(directory: CheckpointDirectory) -> None:
    directory.create_generation(None, {"dp": 2})
    step_id = StepId(1, 7)
    _put_part(directory, step_id, 0)
    with pytest.raises(ManifestError, match=r"00001\.json .* missing: do all ranks share this"):
        directory.commit(step_id, 2)
    _put_part(directory, step_id, 1)
    assert directory.committed() == []
    manifest = directory.commit(step_id, 2)
    assert directory.committed() == directory.lineage() == [step_id]
    assert directory.manifest(step_id) == manifest
    assert directory.find(7) == directory.find(None) == step_id
    with pytest.raises(StepNotFoundError, match="it has: 7"):
        directory.find(8)


def test_committing_twice_is_the_same_manifest(directory: CheckpointDirectory) -> None:
    directory.create_generation(None, {})
    (step_id,) = _save(directory, 1, 7)
    before = (directory.step_path(step_id) / "manifest.json").read_bytes()
    directory.commit(step_id, 2)
    assert (directory.step_path(step_id) / "manifest.json").read_bytes() == before


def test_parts_that_overlap_are_no_step(directory: CheckpointDirectory) -> None:
    step_id = StepId(1, 7)
    part = _put_part(directory, step_id, 0)
    directory.put_part(replace(part, rank=1))
    with pytest.raises(LayoutError, match="two ranks wrote"):
        directory.commit(step_id, 2)
    assert directory.committed() == []


def test_a_part_is_never_replaced(directory: CheckpointDirectory) -> None:
    part = _put_part(directory, StepId(1, 7), 0)
    directory.put_part(part)  # a request sent twice
    with pytest.raises(FileExistsError):
        directory.put_part(replace(part, context={"another": "attempt"}))
    with pytest.raises(FileExistsError):
        directory.put_failure(StepId(1, 7), 0, "no room")


def test_generations_are_numbered_and_kept(directory: CheckpointDirectory) -> None:
    first = directory.create_generation(None, {"dp": 2}, now_s=5.0)
    second = directory.create_generation(StepId(1, 30), {"dp": 4})
    assert (first.number, first.parent, first.fork_step, first.created_s) == (1, None, None, 5.0)
    assert (second.number, second.parent, second.fork_step) == (2, 1, 30)
    assert directory.generations() == {1: first, 2: second}
    assert sorted(os.listdir(directory.root / "generations")) == ["00001.json", "00002.json"]


def test_a_fork_leaves_later_steps_behind_and_they_go_once_it_has_saved(
    directory: CheckpointDirectory,
) -> None:
    directory.create_generation(None, {})
    _save(directory, 1, 10, 20, 30, 40)
    directory.create_generation(StepId(1, 20), {})
    assert directory.retire(keep=2, current=2) == []
    assert directory.committed() == [StepId(1, s) for s in (10, 20, 30, 40)]
    assert directory.lineage() == [StepId(1, 10), StepId(1, 20)]
    _save(directory, 2, 30)
    assert directory.retire(keep=2, current=2) == [StepId(1, 10), StepId(1, 30), StepId(1, 40)]
    assert directory.committed() == directory.lineage() == [StepId(1, 20), StepId(2, 30)]


def test_a_late_writer_of_an_older_generation_harms_nothing(
    directory: CheckpointDirectory,
) -> None:
    directory.create_generation(None, {})
    _save(directory, 1, 10, 20)
    late = StepId(1, 30)
    _put_part(directory, late, 0)  # and then it is held up, and another attempt goes on from 10
    directory.create_generation(StepId(1, 10), {})
    _save(directory, 2, 30)
    _put_part(directory, late, 1)
    directory.commit(late, 2)
    assert directory.lineage() == [StepId(1, 10), StepId(2, 30)]
    assert directory.find(30) == StepId(2, 30)
    assert directory.manifest(StepId(2, 30)).generation == 2
    assert late in directory.retire(keep=5, current=2)


def test_half_written_steps_are_garbage(directory: CheckpointDirectory) -> None:
    directory.create_generation(None, {})
    kept = _save(directory, 1, 10)
    half = StepId(1, 20)
    _put_part(directory, half, 0)
    directory.root.joinpath("step-notes").mkdir()
    directory.root.joinpath("step-000000010-g00001").mkdir()
    assert directory.collect_garbage() == [half]
    assert directory.committed() == kept
    assert sorted(os.listdir(directory.root)) == [
        "generations",
        "step-000000010-g00001",
        "step-00000010-g00001",
        "step-notes",
    ]


def test_what_a_keeper_is_flushing_is_spared(directory: CheckpointDirectory) -> None:
    half, other = StepId(1, 20), StepId(1, 30)
    for step_id in (half, other):
        _put_part(directory, step_id, 0)
    assert directory.collect_garbage(spare={half}) == [other]
    assert directory.step_path(half).is_dir()
    _put_part(directory, half, 1)
    directory.commit(half, 2)


def test_garbage_that_cannot_be_deleted_stays_for_the_next_time(
    directory: CheckpointDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20):
        _put_part(directory, StepId(1, step), 0)
    real = shutil.rmtree

    def not_empty(path: Path) -> None:
        """A rank of a killed job has just made one more file."""
        if "10" in path.name:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        real(path)

    monkeypatch.setattr(shutil, "rmtree", not_empty)
    assert directory.collect_garbage() == [StepId(1, 20)]
    monkeypatch.undo()
    assert directory.committed() == []
    assert directory.collect_garbage() == [StepId(1, 10)]


def test_deleting_takes_the_manifest_first(
    directory: CheckpointDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.create_generation(None, {})
    (step_id,) = _save(directory, 1, 10)

    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        directory.delete(step_id)
    monkeypatch.undo()
    assert directory.committed() == []
    assert directory.collect_garbage() == [step_id]
    directory.delete(step_id)


def test_a_lost_generation_is_named(directory: CheckpointDirectory) -> None:
    directory.create_generation(None, {})
    (parent,) = _save(directory, 1, 10)
    directory.create_generation(parent, {})
    _save(directory, 2, 20)
    (directory.root / "generations" / "00002.json").unlink()
    with pytest.raises(ManifestError, match=r"00002\.json is damaged: .* step 20 needs it"):
        directory.find(None)


@pytest.mark.parametrize("lost", [True, False])
def test_the_first_generation_needs_no_record(directory: CheckpointDirectory, lost: bool) -> None:
    directory.create_generation(None, {})
    saved = _save(directory, 1, 10)
    path = directory.root / "generations" / "00001.json"
    if lost:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-5])
    assert directory.lineage() == saved
    assert directory.create_generation(saved[0], {}).number == 2
    assert directory.lineage() == saved


def test_a_damaged_generation_is_named(directory: CheckpointDirectory) -> None:
    directory.create_generation(None, {})
    (parent,) = _save(directory, 1, 10)
    directory.create_generation(parent, {})
    path = directory.root / "generations" / "00002.json"
    path.write_bytes(path.read_bytes().replace(b'"parent":1', b'"parent":0'))
    with pytest.raises(ManifestError, match=r"generations/00002\.json is damaged"):
        directory.lineage()


def test_files_that_were_copied_to_another_place_are_noticed(
    directory: CheckpointDirectory,
) -> None:
    directory.create_generation(None, {})
    (step_id,) = _save(directory, 1, 10)
    copied = StepId(1, 99)
    shutil.copytree(directory.step_path(step_id), directory.step_path(copied))
    with pytest.raises(ManifestError, match="belongs to another directory"):
        directory.manifest(copied)
    generations = directory.root / "generations"
    shutil.copy(generations / "00001.json", generations / "00002.json")
    with pytest.raises(ManifestError, match="it says that it is number 1"):
        directory.generations()


@pytest.mark.parametrize("how", ["lost", "damaged"])
def test_a_record_is_made_again_from_a_manifest(directory: CheckpointDirectory, how: str) -> None:
    directory.create_generation(None, {})
    _save(directory, 1, 10, 20, 30)
    directory.create_generation(StepId(1, 10), {})
    told = {"parent": 1, "fork_step": 10}
    (saved,) = _save(directory, 2, 15, lineage=told)
    assert directory.manifest(saved).lineage == (1, 10)
    path = directory.root / "generations" / "00002.json"
    if how == "lost":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9])
    assert directory.lineage() == [StepId(1, 10), saved]
    assert (directory.generations()[2].parent, directory.generations()[2].fork_step) == (1, 10)
    assert directory.create_generation(saved, {}).number == 3
    assert directory.lineage() == [StepId(1, 10), saved]


def test_a_writer_that_failed_says_why(directory: CheckpointDirectory) -> None:
    step_id = StepId(1, 7)
    _put_part(directory, step_id, 0)
    directory.put_failure(step_id, 1, "No space left on device")
    assert directory.give_up(step_id, 2) == {1: "No space left on device"}
    with pytest.raises(SaveFailedError, match="step 7 failed: rank 1: No space left") as caught:
        directory.commit(step_id, 2)
    assert caught.value.causes == {1: "No space left on device"}
    assert directory.committed() == []
    assert directory.collect_garbage() == [step_id]


def test_a_writer_that_was_given_up_is_too_late(directory: CheckpointDirectory) -> None:
    step_id = StepId(1, 7)
    _put_part(directory, step_id, 0)
    causes = {1: "it did not say in time that its pack is durable (hung or lost?)"}
    assert directory.give_up(step_id, 2) == directory.give_up(step_id, 2) == causes
    with pytest.raises(CheckpointError, match=r"rank 1 was given up: it did not say in time"):
        _put_part(directory, step_id, 1)
    with pytest.raises(SaveFailedError):
        directory.commit(step_id, 2)


def test_a_step_is_not_committed_with_other_content(directory: CheckpointDirectory) -> None:
    (step_id,) = _save(directory, 1, 7)
    part = directory.step_path(step_id) / "parts" / "00000.json"
    changed = replace(
        decode_part(part.read_bytes(), part),
        context={"mesh": {"dp": 2}, "producer": {}, "objects": {"object.x": 1}},
    )
    part.write_bytes(encode_part(changed))
    with pytest.raises(StepExistsError, match="step-00000007-g00001 exists"):
        directory.commit(step_id, 2)


def test_what_is_being_read_is_not_retired(directory: CheckpointDirectory) -> None:
    directory.create_generation(None, {})
    steps = _save(directory, 1, 10, 20, 30)
    with directory.held(steps[0]):
        assert directory.retire(keep=1, current=1) == [steps[1]]
        assert directory.committed() == [steps[0], steps[2]]
    assert directory.retire(keep=1, current=1) == [steps[0]]


def test_a_killed_put_leaves_nothing_for_long(directory: CheckpointDirectory) -> None:
    directory.create_generation(None, {})
    left = directory.root / "generations" / "00002.json.1a2b3c4d.tmp"
    left.write_bytes(b"half")
    assert directory.newest_generation() == 1
    directory.collect_garbage()
    assert not left.exists()
