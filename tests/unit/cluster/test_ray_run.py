"""A Ray of a run's own: how many nodes, with what, and what is removed of killed ones."""

import fcntl
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from everstep.cluster.ray_nodes import NodePlan, remove_abandoned
from everstep.cluster.ray_run import own_nodes
from everstep.trainer.config import LaunchConfig


@pytest.mark.parametrize(
    ("launch", "ranks", "gpus", "nodes"),
    [
        ({}, 4, (), [(4, (), {})]),
        ({"simulated_nodes": 2}, 4, (), [(2, (), {}), (2, (), {})]),
        ({"simulated_nodes": 2}, 3, (), [(1, (), {}), (2, (), {})]),
        ({"simulated_nodes": 8}, 2, (), [(1, (), {}), (1, (), {})]),
        ({"cpus_per_rank": 0}, 2, (), [(1, (), {})]),
        ({"cpus_per_rank": 0.5}, 3, (), [(2, (), {})]),
        ({"simulated_nodes": 2}, 3, ("0", "3", "5"), [(1, ("0",), {}), (2, ("3", "5"), {})]),
        (
            {"simulated_nodes": 2, "resources_per_rank": {"x": 0.5}},
            3,
            (),
            [(1, (), {"x": 0.5}), (2, (), {"x": 1.0})],
        ),
    ],
)
def test_nodes_are_just_enough(
    launch: Mapping[str, Any],
    ranks: int,
    gpus: Sequence[str],
    nodes: list[tuple[int, tuple[str, ...], Mapping[str, float]]],
) -> None:
    assert own_nodes(ranks, LaunchConfig(**launch), gpus) == [
        NodePlan(cpus=cpus, gpus=names, resources=resources) for cpus, names, resources in nodes
    ]


def test_only_folders_of_helpers_that_are_gone_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    short = tempfile.mkdtemp(prefix="es-", dir="/tmp")
    monkeypatch.setattr(tempfile, "tempdir", short)
    folders = {name: Path(short, f"everstep-ray-{name}") for name in ("gone", "used", "new")}
    for folder in folders.values():
        folder.mkdir()
    (folders["gone"] / "lock").touch()
    (Path(short) / "other").mkdir()
    with (folders["used"] / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        remove_abandoned()
        left = {path.name for path in Path(short).iterdir()}
    for folder in (*folders.values(), Path(short) / "other"):
        if folder.exists():
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    Path(short).rmdir()
    assert left == {"everstep-ray-used", "everstep-ray-new", "other"}
