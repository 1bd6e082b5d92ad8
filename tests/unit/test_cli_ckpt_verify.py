"""``everstep ckpt verify``, ``diff`` and ``gc``: exit codes, and damage that is survived."""

from pathlib import Path

import numpy as np

from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.lock import DirectoryLock
from everstep.words import plural
from tests.support.ckpt_runs import Ckpt, ckpt, manifest_of, run, save, spoil
from tests.support.stored import save_arrays
from tests.support.written_steps import Cut, random_bits, write_step

__all__ = ["ckpt", "run"]


def test_verify(run: Path, ckpt: Ckpt) -> None:
    assert "whole" in ckpt("verify", run)
    same = [ckpt.json("verify", f"{run}@{step}", "--digest") for step in (10, 10, 20, 40)]
    assert all(found["whole"] and found["damages"] == [] for found in same)
    digests = [found["digest"] for found in same]
    assert digests[0] == digests[1]
    assert len({d["state"] for d in digests}) == 3
    assert len({d["rng"] for d in digests}) == 1
    assert len({d["tensors"]["model.b"] for d in digests}) == 1
    assert digests[0]["state"] in ckpt("verify", f"{run}@10", "--digest")


def test_verify_reports_all_damage(run: Path, ckpt: Ckpt) -> None:
    folder = manifest_of(run, StepId(2, 40)).parent
    spoil(folder / "rank-00000-0123abcd.safetensors", at=4096)
    (folder / "rank-00002-0123abcd.safetensors").unlink()
    found = ckpt.json("verify", run, "--digest", code=1)
    assert (found["whole"], found["digest"]) == (False, None)
    assert [(d["file"], d["block"]) for d in found["damages"]] == [
        ("rank-00000-0123abcd.safetensors", 0),
        ("rank-00002-0123abcd.safetensors", None),
    ]
    assert all("model.w" in d["tensors"] or "model.b" in d["tensors"] for d in found["damages"])
    text = ckpt("verify", run, code=1)
    assert f"is damaged in {plural(2, 'place')}" in text
    assert "the file is missing" in text
    spoil(manifest_of(run, StepId(2, 40)))
    ckpt("verify", run, code=1)
    assert "manifest.json is damaged" in ckpt.errors


def test_packs_of_raw_extents(tmp_path: Path, ckpt: Ckpt) -> None:
    step, manifest = write_step(
        tmp_path, {"w": Cut("U8", random_bits((9,), "U8"), ([4],))}, raw=(1,)
    )
    found = ckpt.json("inspect", f"{tmp_path}@1")
    assert [p["kind"] for p in found["packs"]] == ["safetensors", "raw_extents"]
    assert "raw_extents  rank-00001-ab.extents" in ckpt("inspect", f"{tmp_path}@1")
    ckpt("verify", f"{tmp_path}@1")
    path, offset = step / manifest.packs[1].file, manifest.packs[1].blocks.file_offset(0)
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    (damage,) = ckpt.json("verify", f"{tmp_path}@1", code=1)["damages"]
    assert (damage["file"], damage["block"], damage["tensors"]) == (path.name, 0, ["w"])
    (step / manifest.packs[1].table_file).unlink()
    assert "rank-00001-ab.extents.crc32c is missing" in ckpt("ls", tmp_path, code=1)


def test_verify_reads_the_files_of_the_views(run: Path, ckpt: Ckpt) -> None:
    folder = manifest_of(run, StepId(2, 40)).parent
    spoil(folder / "index.ocdbt")
    (folder / "manifest.ocdbt").unlink()
    found = ckpt.json("verify", run, code=1)
    assert {d["file"]: d["problem"] for d in found["damages"]} == {
        "index.ocdbt": "it is not what the manifest makes it: TensorStore cannot use it",
        "manifest.ocdbt": "the file is missing",
    }


def test_diff(run: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    other = tmp_path / "other"
    CheckpointDirectory(other / "checkpoints").create_generation(None, {"rank": 4})
    save(other, StepId(1, 40), 40.0, bounds={"model.w": [(1,), (3,)]}, world_size=4)
    equal = ckpt.json("diff", run, other)
    assert (equal["equal"], equal["compared"], equal["rng_compared"]) == (True, 2, False)
    assert "random generators are not compared" in ckpt("diff", run, other)
    found = ckpt.json("diff", f"{run}@10", f"{run}@20", code=1)
    assert found["tensors"] == [
        {
            "name": "model.w",
            "first": {"dtype": "F32", "shape": [6, 4]},
            "second": {"dtype": "F32", "shape": [6, 4]},
            "differing": 24,
            "nans": 0,
            "max_difference": 10.0,
        }
    ]
    assert found["objects"] == [{"path": "object.data.value.position", "first": 10, "second": 20}]
    text = ckpt("diff", f"{run}@10", f"{run}@20", code=1)
    assert "24 of 24" in text
    assert "object object.data.value.position: 10 / 20" in text
    assert "different: 1 of 3 tensors" in text
    assert ckpt("diff", f"{run}@10", f"{run}@20", "--only", "model.b").startswith("equal")
    ckpt("diff", f"{run}@10", f"{run}@20", "--only", "model.*", "--atol", "10")
    assert ckpt("diff", run, other, "--only", "model.*") == "equal: 2 tensors\n"


def test_diff_of_nothing_is_never_equal(run: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    other = tmp_path / "other"
    CheckpointDirectory(other / "checkpoints").create_generation(None, {"rank": 4})
    save(other, StepId(1, 40), 40.0, bounds={"model.w": [(1,), (3,)]}, world_size=4)
    ckpt("diff", run, other, "--only", "model.*", "--only", "modle.*", code=2)
    assert "no tensor is named 'modle.*'" in ckpt.errors
    ckpt("diff", run, other, "--only", "rng.*", code=2)
    assert "the meshes differ" in ckpt.errors


def test_diff_of_names_and_shapes(tmp_path: Path, ckpt: Ckpt) -> None:
    for name, tensors in (
        ("a", {"x": np.zeros(3, np.float32), "y": np.full(2, np.inf), "z": np.zeros((2, 2))}),
        ("b", {"w": np.zeros(3, np.float32), "y": np.zeros(2), "z": np.zeros((2, 3))}),
    ):
        directory = CheckpointDirectory(tmp_path / name)
        directory.create_generation(None, {"rank": 1})
        save_arrays(directory, StepId(1, 1), tensors)
    found = ckpt.json("diff", tmp_path / "a", tmp_path / "b", code=1)
    assert (found["only_first"], found["only_second"]) == (["x"], ["w"])
    y, z = found["tensors"]
    assert (y["differing"], y["max_difference"]) == (2, "inf")
    assert (z["differing"], z["max_difference"]) == (None, None)
    text = ckpt("diff", tmp_path / "a", tmp_path / "b", code=1)
    assert "F64 [2, 2] / F64 [2, 3]" in text
    assert "different: 2 of 2 tensors, 2 on one side only" in text


def test_diff_exits_with_2_where_it_cannot_compare(run: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    ckpt("diff", run, tmp_path, code=2)
    assert "holds no checkpoints" in ckpt.errors
    ckpt("diff", run, code=2)
    spoil(next(manifest_of(run, StepId(2, 40)).parent.glob("*.safetensors")), at=4096)
    ckpt("diff", run, run, code=2)
    assert "is damaged: block 0" in ckpt.errors


def test_gc_deletes_what_no_run_needs(run: Path, ckpt: Ckpt) -> None:
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    planned = ckpt.json("gc", run, "--keep", "1", "--dry-run")
    assert [(d["step"], d["generation"], d["why"]) for d in planned["deleted"]] == [
        (10, 1, "not among the newest 1"),
        (20, 1, "not among the newest 1"),
        (30, 1, "outside the lineage"),
        (50, 2, "half-written"),
    ]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == kept
    assert "would free" in ckpt("gc", run, "--dry-run")
    gone = ckpt.json("gc", run)
    assert [d["step"] for d in gone["deleted"]] == [30, 50]
    assert [s["step"] for s in ckpt.json("ls", run, "--all")["steps"]] == [10, 20, 40]
    assert "freed" in ckpt("gc", run, "--keep", "1")
    assert [s["step"] for s in ckpt.json("ls", run, "--all")["steps"]] == [40]
    assert ckpt.json("gc", run, "--keep", "1")["deleted"] == []


def test_gc_is_refused_while_a_job_writes(run: Path, ckpt: Ckpt) -> None:
    with DirectoryLock(run / "checkpoints"):
        ckpt("gc", run, code=1)
        assert "is in use by another job" in ckpt.errors
        assert len(ckpt.json("gc", run, "--dry-run")["deleted"]) == 2
    assert len(ckpt.json("ls", run, "--all")["steps"]) == 5


def test_gc_keeps_the_parents_steps_until_the_newest_attempt_has_saved(
    run: Path, ckpt: Ckpt
) -> None:
    directory = CheckpointDirectory(run / "checkpoints")
    directory.create_generation(StepId(1, 10), {"rank": 1})
    gone = ckpt.json("gc", run)
    assert [d["step"] for d in gone["deleted"]] == [50]
    assert [s["step"] for s in ckpt.json("ls", run)["steps"]] == [10]
