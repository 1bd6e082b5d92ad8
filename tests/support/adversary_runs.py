"""Runs the adversary's loops under snapshots, and compares each with what was to be saved."""

from pathlib import Path

import torch

from everstep.checkpoint.checkpointer import Checkpointer
from tests.support.adversary import Flavour, training
from tests.support.snapshot_checks import Moment, SealedCopies, differences, moment


def torn(
    folder: Path, flavour: Flavour, steps: int, width: int = 8, device: str = "cpu"
) -> tuple[int, list[str]]:
    """How many snapshots were taken, and what was wrong in them."""
    torch.manual_seed(7)
    loop = training(flavour, width, device)
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
