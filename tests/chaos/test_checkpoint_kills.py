"""A saving process killed before every single file operation: the old step or the new, whole."""

import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.torch_state import State
from tests.support.checkpoints import bits, fresh_state, tiny_state, train_step
from tests.support.kills import die_before, in_process, watch

pytestmark = pytest.mark.chaos


def _resume_and_save(root: Path, resume: int | None) -> Iterator[State]:
    """What the killed process does: one more step of training, saved as step 3."""
    torch.set_num_threads(1)
    state = fresh_state()
    with Checkpointer(root, keep=1) as checkpointer:
        checkpointer.load(state, resume)
        train_step(state)
        yield state
        checkpointer.save(3, state)
    yield state


def _save_until(root: Path, resume: int | None, kill_at: int, log: Path) -> None:
    """Runs in a process of its own; dies before change number ``kill_at``."""
    steps = _resume_and_save(root, resume)
    next(steps)
    lines = die_before(kill_at)
    next(steps)
    log.write_text("\n".join(lines))


@pytest.fixture
def base(tmp_path: Path) -> tuple[Path, dict[int, dict[str, bytes]]]:
    """Steps 1 and 2, committed, and the bits of their states."""
    root, wanted = tmp_path / "base", {}
    state = tiny_state()
    with Checkpointer(root) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state)
            wanted[step] = bits(state)
            train_step(state)
    return root, wanted


def _expected_step_3(base: Path, folder: Path, resume: int | None) -> dict[str, bytes]:
    """The state that a process which is not killed saves."""
    shutil.copytree(base, folder)
    *_, state = _resume_and_save(folder, resume)
    return bits(state)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("resume", [None, 1], ids=["newest", "fork"])
def test_killed_before_any_change(
    tmp_path: Path, base: tuple[Path, dict[int, dict[str, bytes]]], resume: int | None
) -> None:
    root, wanted = base
    wanted[3] = _expected_step_3(root, tmp_path / "whole", resume)
    log = tmp_path / "log"
    shutil.copytree(root, tmp_path / "counted")
    assert in_process(_save_until, tmp_path / "counted", resume, -1, log) == 0
    changes = log.read_text().split("\n")
    committed = next(i for i, c in enumerate(changes) if re.match(r"link .*/manifest\.json", c))
    found = []
    for kill_at in range(len(changes)):
        where = tmp_path / f"killed-{kill_at}"
        shutil.copytree(root, where)
        code = in_process(_save_until, where, resume, kill_at, log)
        assert code == -signal.SIGKILL, changes[kill_at]
        found.append(_look(where, wanted, changes[kill_at]))
        shutil.rmtree(where)
    old = set(found[: committed + 1])
    assert old == ({2} if resume is None else {1, 2})
    assert set(found[committed + 1 :]) == {3}
    assert sum(change.startswith(("unlink", "rmdir")) for change in changes) > 4


def _look(root: Path, wanted: dict[int, dict[str, bytes]], at: str) -> int:
    """What the next process finds and does; the step that it found."""
    state = fresh_state()
    for step_id in CheckpointDirectory(root).lineage():
        with Checkpointer(root, read_only=True) as reader:
            reader.load(state, step_id.step)
        assert bits(state) == wanted[step_id.step], at
    with Checkpointer(root, keep=1) as checkpointer:
        found = checkpointer.load(state) - 1
        assert bits(state) == wanted[found], at
        train_step(state)
        checkpointer.save(4, state)
        assert checkpointer.steps() == [4], at
    names = sorted(p.name for p in root.iterdir())
    assert len([n for n in names if n.startswith("step-")]) == 1, at
    assert not list(root.rglob("*.tmp")), at
    return found


def test_everything_is_durable_before_the_manifest_appears(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert in_process(_note_what_a_power_cut_would_lose, tmp_path / "c", log) == 0
    generation, part, *index, manifest = log.read_text().split("\n")
    assert part.startswith("step-00000001-g00001/parts/00000.json: ")
    assert "bytes" not in part
    assert generation == "generations/00001.json: nothing"
    assert [line.split(":")[0] for line in index] == [
        "step-00000001-g00001/index.ocdbt",
        "step-00000001-g00001/manifest.ocdbt",
    ]
    assert manifest == "step-00000001-g00001/manifest.json: nothing"


def _note_what_a_power_cut_would_lose(root: Path, log: Path) -> None:
    """At each link: which bytes and which directory entries have not been synced."""
    at_risk: set[str] = set()
    lines: list[str] = []

    def before(name: str, args: tuple[Any, ...]) -> None:
        named = not isinstance(args[0], int)
        path = Path(args[0] if named else os.readlink(f"/proc/self/fd/{args[0]}"))
        if name in ("open", "mkdir"):
            at_risk.add(f"entry {path}")
        elif name in ("write", "ftruncate"):
            at_risk.add(f"bytes {path}")
        elif name in ("fsync", "fdatasync"):
            at_risk.discard(f"bytes {path}")
            if path.is_dir():
                at_risk.difference_update(f"entry {p}" for p in path.iterdir())
        elif name == "link":
            at_risk.discard(f"entry {path}")  # the temporary name, which is not to stay
            lines.append(f"{Path(args[1]).relative_to(root)}: {sorted(at_risk) or 'nothing'}")
            at_risk.add(f"entry {args[1]}")

    state = tiny_state()
    with Checkpointer(root) as checkpointer:
        checkpointer.load(state)  # takes the lock, whose bytes need not last
        watch(before)
        checkpointer.save(1, state)
    log.write_text("\n".join(lines))
