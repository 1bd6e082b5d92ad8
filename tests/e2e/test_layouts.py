"""Every layout gives the losses of one rank, under every driver, through the command line."""

import math
from importlib import resources
from pathlib import Path

import pytest

from everstep.cluster.ray_nodes import OwnRay
from everstep.trainer.config_load import load_config
from tests.support import cli

DEBUG = sorted(
    entry.name.removesuffix(".yaml")
    for entry in resources.files("everstep").joinpath("configs").iterdir()
    if entry.name.startswith("debug_")
)
IN_EVERY_RUN = {"debug_single", "debug_dp2_tp2", "debug_pp2"}
ZERO_BUBBLE = ("parallel.pipeline_schedule=zero_bubble", "parallel.stages_per_rank=1")
PIPELINES = [
    ("mesh.dp_shard=2",),
    ("mesh.dp_replicate=2",),
    ("mesh.tp=2",),
    ("mesh.dp_replicate=2", "mesh.dp_shard=2"),
    ("mesh.dp_shard=4",),
    ("mesh.dp_replicate=2", "mesh.tp=2", "parallel.activation_checkpointing=true"),
    ("mesh.dp_shard=2", *ZERO_BUBBLE),
    ("mesh.dp_shard=2", "mesh.tp=2", *ZERO_BUBBLE),
]
"""Changes to debug_pp2: further layouts of the same run."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> dict[int, float]:
    return train(folder, "debug_single")


def train(
    folder: Path, name: str, *overrides: str, nodes: OwnRay | None = None
) -> dict[int, float]:
    """Losses of a run on this host, or on ``nodes``; run once however often it is asked for."""
    run_dir = folder / "-".join((name, *overrides, "ray" if nodes else "local"))
    if not run_dir.exists():
        arguments = ["train", name, "--run-dir", str(run_dir), *overrides]
        if nodes is not None:
            # 8 ranks on the 6 logical CPUs of the nodes, with neighbours on different nodes
            arguments += ["--address", nodes.address, "launch.cpus_per_rank=0.5"]
            arguments += ["launch.placement=spread"]
        variables = nodes.environment if nodes else {}
        code, output = cli.run(*arguments, cwd=folder, variables=variables, timeout_s=200)
        assert code == 0, output
    return cli.losses(run_dir)


def assert_losses_of_one_rank(found: dict[int, float], one_rank: dict[int, float]) -> None:
    assert len(found) == 20
    assert sorted(found) == sorted(one_rank)
    for step, loss in one_rank.items():
        assert math.isclose(found[step], loss, rel_tol=1e-5), (step, found[step], loss)


@pytest.mark.multiproc
@pytest.mark.timeout(420)
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
    assert_losses_of_one_rank(train(folder, name), one_rank)


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.timeout(420)
@pytest.mark.parametrize("overrides", PIPELINES, ids=" ".join)
def test_losses_of_one_rank_in_other_pipelines(
    folder: Path, one_rank: dict[int, float], overrides: tuple[str, ...]
) -> None:
    assert_losses_of_one_rank(train(folder, "debug_pp2", *overrides), one_rank)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.multiproc
@pytest.mark.timeout(420)
@pytest.mark.parametrize(
    "arguments",
    [
        *((name,) for name in DEBUG if name != "debug_single"),
        *(("debug_pp2", *overrides) for overrides in PIPELINES),
    ],
    ids=" ".join,
)
def test_losses_under_ray_are_those_of_the_local_launcher(
    folder: Path, ray_nodes: OwnRay, arguments: tuple[str, ...]
) -> None:
    expected = train(folder, *arguments)
    assert len(expected) == 20
    assert train(folder, *arguments, nodes=ray_nodes) == expected
