"""zarr-python reads reference sets, and never what is not there."""

import errno
import json
from pathlib import Path
from unittest import mock

import fsspec
import pytest
import zarr
from fsspec.implementations.reference import ReferenceNotReachable

from everstep.checkpoint.views import zarr_references
from everstep.checkpoint.views.zarr_references import write_references
from tests.support.written_steps import Cut, random_bits, uneven_cuts, write_step


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A committed step beside its ``references.json``."""
    path, manifest = write_step(tmp_path / "c", {"w": Cut("I32", random_bits((64,), "I32"))})
    write_references(manifest, str(path), tmp_path / "references.json")
    return path


def _open(step: Path) -> zarr.Group:
    fsspec.filesystem("reference", fo={}).clear_instance_cache()
    options = {"fo": str(step.parents[1] / "references.json")}
    return zarr.open_group("reference://", mode="r", storage_options=options)


def test_a_lost_pack_is_an_error(step: Path) -> None:
    group = _open(step)
    next(step.glob("rank-*")).unlink()
    with pytest.raises(ReferenceNotReachable):
        group["w"][...]


@pytest.mark.parametrize("left_bytes", [0, 4096, 4100])
def test_a_short_pack_is_an_error(step: Path, left_bytes: int) -> None:
    group = _open(step)
    path = next(step.glob("rank-*"))
    path.write_bytes(path.read_bytes()[:left_bytes])
    with pytest.raises(ValueError):
        group["w"][...]


def test_the_group_is_consolidated_and_arrays_open_alone(tmp_path: Path) -> None:
    path, manifest = write_step(tmp_path / "c", uneven_cuts())
    file = tmp_path / "references.json"
    write_references(manifest, str(path), file)
    references = json.loads(file.read_text())
    assert references["version"] == 1
    assert references["templates"] == {"u": str(path)}
    assert references["refs"]["scalar/c"][0].startswith("{{u}}/rank-")
    store = {"fo": str(file)}
    group = zarr.open_consolidated("reference://", storage_options=store)
    assert set(group) == set(_nodes(uneven_cuts()))
    alone = zarr.open_array("reference://", path="types.F32", mode="r", storage_options=store)
    assert alone[...].tobytes() == uneven_cuts()["types.F32"].bits.tobytes()
    assert sorted(group["columns"]) == group["columns"].attrs["everstep_arrays"]


def _nodes(cuts: dict[str, Cut]) -> list[str]:
    changed = {"__x": "%5F_x", "optimizer.a/b%.__x": "optimizer.a%2Fb%25.__x"}
    return [changed.get(name, name) for name in cuts]


def test_nothing_is_replaced_and_nothing_half_written_stays(tmp_path: Path) -> None:
    path, manifest = write_step(tmp_path / "c", {"w": Cut("U8", random_bits((4,), "U8"))})
    file = tmp_path / "references.json"
    full = OSError(errno.ENOSPC, "no space left")
    with (
        mock.patch.object(zarr_references, "encode_metadata", side_effect=full),
        pytest.raises(OSError, match="no space left"),
    ):
        write_references(manifest, str(path), file)
    assert not file.exists()
    write_references(manifest, str(path), file)
    before = file.read_bytes()
    with pytest.raises(FileExistsError):
        write_references(manifest, str(path), file)
    assert file.read_bytes() == before
