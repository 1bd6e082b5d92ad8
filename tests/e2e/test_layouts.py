"""Every packaged debug run gives the losses of one rank, through the command line."""

import math
from importlib import resources
from pathlib import Path

import pytest

from everstep.trainer.config_load import load_config
from tests.support import cli

DEBUG = sorted(
    entry.name.removesuffix(".yaml")
    for entry in resources.files("everstep").joinpath("configs").iterdir()
    if entry.name.startswith("debug_")
)
IN_EVERY_RUN = {"debug_single", "debug_dp2_tp2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> dict[int, float]:
    return train(folder, "debug_single")


def train(folder: Path, name: str) -> dict[int, float]:
    code, output = cli.run("train", name, cwd=folder, timeout_s=110)
    assert code == 0, output
    return cli.losses(folder / "runs" / name)


@pytest.mark.multiproc
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "name",
    [
        n if n in IN_EVERY_RUN else pytest.param(n, marks=pytest.mark.slow)
        for n in DEBUG
        if n != "debug_single"
    ],
)
def test_losses_of_one_rank(folder: Path, one_rank: dict[int, float], name: str) -> None:
    assert load_config(name).parallel.precision == "fp32"
    found = train(folder, name)
    assert len(found) == 20
    assert sorted(found) == sorted(one_rank)
    for step, loss in one_rank.items():
        assert math.isclose(found[step], loss, rel_tol=1e-5), (step, found[step], loss)
