"""Snapshots while everything is changed as early as it may be: each is what the save saw."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.snapshots import engine
from everstep.checkpoint.snapshots.fences import Fences
from tests.support.adversary import FLAVOURS, Flavour, OwnSgd, compiled, training
from tests.support.snapshot_checks import Moment, SealedCopies, copy_at, differences, moment

ONLY_HELPERS = 0.0
"""A rate: background threads copy nothing, so that everything is copied as late as possible."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are small, and the processors are others' as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def torn(folder: Path, flavour: Flavour, steps: int, width: int = 8) -> tuple[int, list[str]]:
    """How many snapshots were taken, and what was wrong in them."""
    torch.manual_seed(7)
    loop = training(flavour, width)
    memory = SealedCopies()
    wrong: list[str] = []
    last: tuple[int, Moment] | None = None

    def compare() -> None:
        if last is not None:
            step, wanted = last
            wrong.extend(f"{step}: {name}" for name in differences(wanted, memory.take(step)))

    with Checkpointer(folder, memory=memory) as checkpointer:
        checkpointer.load(loop.state)
        for step in range(steps):
            loop.train()
            loop.ema.update()
            wanted = moment(loop.state)
            handle = checkpointer.save(step, loop.state)
            loop.changed_after_save()
            if handle.skipped is None:
                compare()
                last = step, wanted
        checkpointer.wait_captured()
        compare()
        taken = checkpointer.report().taken
    return taken, wrong


@pytest.mark.parametrize("name", FLAVOURS)
def test_snapshots_are_whole(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_at(monkeypatch, ONLY_HELPERS)
    taken, wrong = torn(tmp_path, FLAVOURS[name], steps=6)
    assert not wrong
    assert taken >= 4  # without a step before it, a save may find no ticket posted


@pytest.mark.parametrize("name", FLAVOURS)
def test_without_the_fence_they_are_torn(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test of the test: hooks that are counted but do not wait."""
    monkeypatch.setattr(engine, "Fences", lambda _: Fences(lambda: None))
    copy_at(monkeypatch, ONLY_HELPERS)
    _, wrong = torn(tmp_path, FLAVOURS[name], steps=4)
    assert any("optimizer." in name for name in wrong)
    assert any("model." in name for name in wrong)


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAVOURS)
def test_thousands_of_snapshots_are_whole(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (rate, steps, width) in enumerate(
        [(ONLY_HELPERS, 120, 8), (3e6, 60, 64), (None, 60, 8), (None, 20, 768)]
    ):
        copy_at(monkeypatch, rate)
        taken, wrong = torn(tmp_path / str(number), FLAVOURS[name], steps, width)
        assert not wrong
        assert taken >= 0.6 * steps


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("flavour", [compiled(torch.optim.AdamW, lr=0.001), compiled(OwnSgd)])
def test_a_compiled_step_waits(
    flavour: Flavour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_at(monkeypatch, ONLY_HELPERS)
    taken, wrong = torn(tmp_path, flavour, steps=30)
    assert not wrong
    assert taken >= 20
