"""A checkpoint of any layout is loaded on any other: bit for bit, and training goes on the same."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.torch_collective import ProcessGroupCollective
from everstep.checkpoint.torch_state import split_objects
from tests.support.logical import logical_digests
from tests.support.pipelines import PipelineRun, Trainer
from tests.support.spawn import run_ranks

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(300)]
STEPS = 20
SAVE_AFTER = 2
"""Updates before a run saves: the next one in a chain starts there."""
LAYOUTS = {
    "1": {},
    "dp2": {"dp_shard": 2},
    "dp4": {"dp_shard": 4},
    "hsdp2x2": {"dp_replicate": 2, "dp_shard": 2},
    "tp2": {"tp": 2},
    "dp2xtp2": {"dp_shard": 2, "tp": 2},
    "pp2": {"pp": 2},
    "pp2xdp2": {"pp": 2, "dp_shard": 2},
    "pp2xtp2": {"pp": 2, "tp": 2},
    "pp2xdp2xtp2": {"pp": 2, "dp_shard": 2, "tp": 2},
}
CHAIN = [
    "dp4", "dp2xtp2", "pp2", "hsdp2x2", "pp2xdp2xtp2", "1", "pp2xtp2", "dp2",
    "tp2", "pp2xdp2", "dp4",
]  # fmt: skip
"""Every layout is loaded from another one and by another one; 10 pairs."""


@dataclass(frozen=True)
class Trained:
    """What a run found, saved, and went through."""

    first_step: int
    found: dict[str, str]
    """Digests of logical tensors and of the data position after loading, over all ranks."""
    saved: dict[str, str]
    """The same when it saved."""
    losses: list[float]
    """Mean loss in nats, from its first step on."""

    @property
    def losses_after_save(self) -> list[float]:
        """What whoever continues from its checkpoint should see."""
        return self.losses[SAVE_AFTER:]


def _train(rank: int, world_size: int, layout: str, source: str, target: str) -> Trained:
    """Loads what ``source`` holds, trains, saves to ``target`` on the way; for ``run_ranks``."""
    run = PipelineRun(**LAYOUTS[layout], dim=24, layers=2, global_batch=8, steps=200, tie=True)
    trainer = Trainer(run, rank)
    state = trainer.engine.state(trainer.stream)

    def digests() -> dict[str, str]:
        return {**logical_digests(trainer.engine), "objects": repr(split_objects(state)[0])}

    shared = {
        "collective": ProcessGroupCollective(timeout_s=60),
        "mesh": {axis: getattr(run.shape, axis) for axis in trainer.coordinate},
        "coordinate": trainer.coordinate,
    }
    with Checkpointer(source, read_only=True, **shared) as reader:
        first_step = reader.load(state)
    found, saved, losses = digests(), {}, []
    for step in range(STEPS + SAVE_AFTER):
        if step == SAVE_AFTER:
            saved = digests()
            with Checkpointer(target, **shared) as writer:
                writer.save(first_step + step - 1, state)
        losses.append(trainer.step()[0])
    return Trained(first_step, found, saved, losses)


def train(layout: str, source: Path, target: Path) -> Trained:
    """One run, its ranks put together."""
    world_size = PipelineRun(**LAYOUTS[layout]).shape.world_size
    ranks = run_ranks(_train, world_size, layout, str(source), str(target), timeout_s=200)
    found: dict[str, str] = {}
    saved: dict[str, str] = {}
    for rank in ranks:
        assert rank.losses == ranks[0].losses
        for mine, together in ((rank.found, found), (rank.saved, saved)):
            assert all(together.setdefault(name, d) == d for name, d in mine.items())
    return Trained(ranks[0].first_step, found, saved, ranks[0].losses)


def check_continues(source: Trained, target: Trained) -> None:
    """A run that loaded what another one saved has its state, and goes on as that one did."""
    assert target.first_step == source.first_step + SAVE_AFTER
    assert target.found == source.saved
    assert sum(name.startswith("optimizer.") for name in source.saved) > 50
    expected = source.losses_after_save
    assert abs(target.losses[0] - expected[0]) <= 4 * np.spacing(np.float32(expected[0]))
    np.testing.assert_allclose(target.losses[: len(expected)], expected, rtol=1e-5)


class Runs:
    """Runs that were asked for, each done once: by the layouts that led to them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._done: dict[tuple[str, ...], Trained] = {}

    def after(self, *layouts: str) -> Trained:
        """The run on the last layout, which continues from the one on the layout before."""
        if layouts not in self._done:
            if layouts[:-1]:
                self.after(*layouts[:-1])
            self._done[layouts] = train(layouts[-1], self._at(layouts[:-1]), self._at(layouts))
        return self._done[layouts]

    def _at(self, layouts: tuple[str, ...]) -> Path:
        return self._root / ("_".join(layouts) or "nothing")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    return Runs(tmp_path_factory.mktemp("any"))


@pytest.mark.parametrize("link", range(1, len(CHAIN)), ids=lambda n: f"{CHAIN[n - 1]}-{CHAIN[n]}")
def test_a_chain_of_layouts_goes_on_where_the_last_one_saved(runs: Runs, link: int) -> None:
    check_continues(runs.after(*CHAIN[:link]), runs.after(*CHAIN[: link + 1]))


def test_the_chain_has_every_layout_on_both_sides() -> None:
    assert set(CHAIN[:-1]) == set(CHAIN[1:]) == set(LAYOUTS)


@pytest.mark.slow
@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_any_layout_is_loaded_on_any_other(runs: Runs, source: str, target: str) -> None:
    check_continues(runs.after(source), runs.after(source, target))
