"""Every committed step carries its index; damage to it is found, and harms no load."""

from pathlib import Path

import pytest

from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.store import Folder
from everstep.checkpoint.store_local import LocalStore
from everstep.checkpoint.verify import verify_index
from everstep.checkpoint.views.index_files import index_files
from tests.support.written_steps import uneven_cuts, write_step


def test_a_step_has_its_index_files(tmp_path: Path) -> None:
    path, manifest = write_step(tmp_path, uneven_cuts())
    found = {p.name: p.read_bytes() for p in path.glob("*.ocdbt")}
    assert found == index_files(manifest)
    assert verify_index(Folder(LocalStore(tmp_path), path.name), manifest) == []


@pytest.mark.parametrize("name", ["index.ocdbt", "manifest.ocdbt"])
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    path, manifest = write_step(tmp_path, uneven_cuts())
    files = Folder(LocalStore(tmp_path), path.name)
    data = (path / name).read_bytes()
    for spoilt in (data[:-1], data[:-1] + bytes([data[-1] ^ 1])):
        (path / name).write_bytes(spoilt)
        assert [d.file for d in verify_index(files, manifest)] == [name]
    (path / name).unlink()
    assert [d.file for d in verify_index(files, manifest)] == [name]
    assert CheckpointDirectory(tmp_path).manifest(StepId(1, 1)) == manifest


def test_they_go_with_the_step(tmp_path: Path) -> None:
    path, _ = write_step(tmp_path, uneven_cuts())
    CheckpointDirectory(tmp_path).delete(StepId(1, 1))
    assert not path.exists()
