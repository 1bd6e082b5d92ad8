"""``everstep ckpt`` on URLs: a file system in memory, and a real S3 server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from everstep.checkpoint.lineage import StepId
from tests.support.ckpt_runs import Ckpt, arrays, ckpt, manifest_of, run
from tests.support.s3_server import S3Server

__all__ = ["ckpt", "run"]


@pytest.fixture
def memory(run: Path) -> Iterator[tuple[str, Any]]:
    """The run of the other tests at a URL, and the file system."""
    fs = fsspec.filesystem("memory")
    fs.put(f"{run}/", "/ckpt-tool/run/", recursive=True)
    yield "memory://ckpt-tool/run", fs
    fs.rm("/ckpt-tool", recursive=True)


def test_every_command_takes_a_url(memory: tuple[str, Any], run: Path, ckpt: Ckpt) -> None:
    url, fs = memory
    there, here = (ckpt.json("ls", place, "--all")["steps"] for place in (url, run))
    for facts in (*there, *here):
        del facts["path"], facts["saved_s"]
    assert there == here
    assert ckpt.json("inspect", f"{url}@20")["path"] == (
        "memory://ckpt-tool/run/checkpoints/step-00000020-g00001"
    )
    assert ckpt.json("inspect", f"{url}/checkpoints/step-00000030-g00001/")["step"] == 30
    mine, its = (ckpt.json("verify", place, "--digest") for place in (run, url))
    assert its["whole"]
    assert mine["digest"] == its["digest"]
    assert ckpt.json("diff", run, url)["equal"]
    ckpt("diff", f"{url}@10", url, code=1)
    for place, words in (
        ("memory://ckpt-tool", "holds no checkpoints"),
        ("nothing://x", "nothing"),
    ):
        ckpt("ls", place, code=1)
        assert words in ckpt.errors
        assert ckpt.errors.count("\n") == 1
    assert not [path for path in fs.find("/ckpt-tool") if "lease" in path]


def test_what_cannot_be_reached_is_told_with_a_way_out(
    ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = type(fsspec.filesystem("memory"))

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Unable to locate\ncredentials")

    monkeypatch.setattr(memory, "ls", refuse)
    for command in (("ls",), ("verify",), ("export", "x", "--to", "torch")):
        ckpt(command[0], "memory://ckpt-tool/run", *command[1:], code=1)
        assert ckpt.errors == (
            "error: 'memory://ckpt-tool/run' cannot be reached: Unable to locate credentials; "
            "check the URL, its options and the credentials\n"
        )


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_every_export_reads_a_url(
    memory: tuple[str, Any], run: Path, tmp_path: Path, ckpt: Ckpt
) -> None:
    url, _ = memory
    for to in ("safetensors", "torch", "dcp", "zarr", "zarr-references"):
        here, there = tmp_path / f"{to}-here", tmp_path / f"{to}-there"
        for place, target in ((run, here), (f"{url}/", there)):
            ckpt("export", place, target, "--to", to)
        files = [p.relative_to(here) for p in here.rglob("*") if p.is_file()] or [Path()]
        for file in files if to not in ("torch", "dcp", "zarr-references") else ():
            assert (here / file).read_bytes() == (there / file).read_bytes()
        assert there.exists()
    found = torch.load(tmp_path / "torch-there", weights_only=True)
    np.testing.assert_array_equal(found["w"].numpy(), arrays(40.0)["model.w"])
    same = ckpt.json("import", tmp_path / "dcp-there", tmp_path / "back", "--from", "dcp")
    assert ckpt.json("diff", url, same["path"], "--only", "model.*")["equal"]
    assert f"{url}/checkpoints/step-00000040" in (tmp_path / "zarr-references-there").read_text()
    ckpt("export", url, tmp_path / "hf", "--to", "hf", code=1)
    assert f"{url}/checkpoints/step-00000040-g00002 does not say what model" in ckpt.errors


def test_damage_at_a_url(memory: tuple[str, Any], ckpt: Ckpt) -> None:
    url, fs = memory
    folder = f"/ckpt-tool/run/checkpoints/{manifest_of(Path(), StepId(2, 40)).parent.name}"
    first, second, _ = (f"{folder}/rank-0000{rank}-0123abcd.safetensors" for rank in range(3))
    data = bytearray(fs.cat_file(first))
    data[4096] ^= 1
    fs.pipe_file(first, bytes(data))
    fs.rm(second)
    assert "is missing" in ckpt.json("ls", url, code=1)["steps"][-1]["problem"]
    found = ckpt.json("verify", url, code=1)
    assert [d["block"] for d in found["damages"]] == [0, None]


def test_gc_at_a_url_leaves_alone_what_another_job_may_be_writing(
    memory: tuple[str, Any], ckpt: Ckpt
) -> None:
    url, _ = memory
    planned = ckpt.json("gc", url, "--keep", "1", "--dry-run")["deleted"]
    assert [d["step"] for d in planned] == [10, 20, 30]  # 50 may be being saved
    assert [d["step"] for d in ckpt.json("gc", url, "--keep", "1")["deleted"]] == [10, 20, 30]
    assert [s["step"] for s in ckpt.json("ls", url, "--all")["steps"]] == [40, 50]


def test_a_step_that_is_being_read_is_left(run: Path, ckpt: Ckpt) -> None:
    from everstep.checkpoint.open_place import open_place

    place = open_place(f"{run}@10")
    with place.open(place.chosen()):
        found = ckpt.json("gc", run, "--keep", "1")
        assert [d["step"] for d in found["left"]] == [10]
        assert "is left" in ckpt("gc", run, "--keep", "1")
    assert [d["step"] for d in ckpt.json("gc", run, "--keep", "1")["deleted"]] == [10]


def test_on_s3(run: Path, tmp_path: Path, ckpt: Ckpt, s3: S3Server) -> None:
    url = s3.new_url()
    fs = fsspec.filesystem("s3", use_listings_cache=False, **s3.options)
    fs.put(f"{run}/", f"{url}/", recursive=True)
    options: list[str] = []
    for key, value in s3.options.items():
        options += ["--storage-option", f"{key}={value}"]
    assert [s["step"] for s in ckpt.json("ls", url, *options)["steps"]] == [10, 20, 40]
    assert ckpt.json("verify", url, "--digest", *options)["whole"]
    assert ckpt.json("diff", url, url, *options)["equal"]
    target = tmp_path / "w.safetensors"
    ckpt("export", url, target, "--to", "safetensors", "--what", "everything", *options)
    assert load_file(target).keys() == arrays(40.0).keys()
    gone = ckpt.json("gc", url, "--keep", "1", *options)["deleted"]
    assert [d["step"] for d in gone] == [10, 20, 30]
    assert [s["step"] for s in ckpt.json("ls", url, *options)["steps"]] == [40]
