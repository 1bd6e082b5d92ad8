"""Every committed step carries its index; damage to it is found, and harms no load."""

from pathlib import Path

import pytest

from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.views.index_files import damaged_index_files, index_files
from tests.support.written_steps import uneven_cuts, write_step


def test_a_step_has_its_index_files(tmp_path: Path) -> None:
    path, manifest = write_step(tmp_path, uneven_cuts())
    found = {p.name: p.read_bytes() for p in path.glob("*.ocdbt")}
    assert found == index_files(manifest)
    assert damaged_index_files(manifest, lambda name: (path / name).read_bytes()) == []


@pytest.mark.parametrize("name", ["index.ocdbt", "manifest.ocdbt"])
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    path, manifest = write_step(tmp_path, uneven_cuts())

    def read(name: str) -> bytes:
        return (path / name).read_bytes()

    data = read(name)
    (path / name).write_bytes(data[:-1])
    assert damaged_index_files(manifest, read) == [name]
    (path / name).unlink()
    assert damaged_index_files(manifest, read) == [name]
    assert CheckpointDirectory(tmp_path).manifest(StepId(1, 1)) == manifest


def test_they_go_with_the_step(tmp_path: Path) -> None:
    path, _ = write_step(tmp_path, uneven_cuts())
    CheckpointDirectory(tmp_path).delete(StepId(1, 1))
    assert not path.exists()
