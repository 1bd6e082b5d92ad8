"""``everstep ckpt``: what people see, what programs get, exit codes, damage that is survived."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import everstep
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.lock import DirectoryLock
from everstep.cli import main
from everstep.words import plural
from tests.support.stored import Array, save_arrays
from tests.support.written_steps import Cut, random_bits, write_step

ROOT = Path(everstep.__file__).parent.parent


def arrays(value: float = 1.0) -> dict[str, Array]:
    return {
        "model.w": np.full((6, 4), value, np.float32),
        "model.b": np.arange(5),
        "rng.rank0.x": np.arange(9, dtype=np.uint8),
    }


def save(run: Path, step_id: StepId, value: float = 1.0, **options: Any) -> None:
    save_arrays(
        CheckpointDirectory(run / "checkpoints"),
        step_id,
        arrays(value),
        objects={"object.data": {"value": {"position": step_id.step}}},
        **options,
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 10, 20, 30 of one attempt; one that went on from 20, saved 40, and began 50."""
    run = tmp_path / "run"
    directory = CheckpointDirectory(run / "checkpoints")
    directory.create_generation(None, {"rank": 1})
    for step in (10, 20, 30):
        save(run, StepId(1, step), float(step))
    directory.create_generation(StepId(1, 20), {"rank": 3}, now_s=1e9)
    save(run, StepId(2, 40), 40.0, bounds={"model.w": [(2, 4), ()]}, world_size=3)
    half = directory.begin_step(StepId(2, 50))
    (half / "rank-00000-aa.safetensors").write_bytes(bytes(100))
    return run


class Ckpt:
    """The commands, called in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str | Path, code: int = 0) -> str:
        """What a command prints; its exit code has to be this."""
        with pytest.raises(SystemExit) as ended:
            main(["ckpt", *map(str, arguments)])
        captured = self._capsys.readouterr()
        self.errors = captured.err
        assert int(ended.value.code or 0) == code, captured.out + captured.err
        return captured.out

    def json(self, *arguments: str | Path, code: int = 0) -> Any:
        """What it prints as JSON."""
        return json.loads(self(*arguments, "--json", code=code))


@pytest.fixture
def ckpt(capsys: pytest.CaptureFixture[str]) -> Ckpt:
    return Ckpt(capsys)


def manifest_of(run: Path, step_id: StepId) -> Path:
    return CheckpointDirectory(run / "checkpoints").step_path(step_id) / "manifest.json"


def spoil(path: Path, at: int = 30) -> None:
    """Flip a bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_ls_lists_the_lineage(run: Path, ckpt: Ckpt) -> None:
    lines = ckpt("ls", run).splitlines()
    assert lines[0].split() == ["step", "generation", "size", "ranks", "saved", "age", "state"]
    assert [(line.split()[:2], line.split()[-1]) for line in lines[1:4]] == [
        (["10", "1"], "whole"),
        (["20", "1"], "whole"),
        (["40", "2"], "whole"),
    ]
    assert lines[4:] == ["and 2 outside the lineage or half-written: --all"]
    assert ckpt("ls", run / "checkpoints").splitlines()[0] == lines[0]


def test_ls_with_everything_as_json(run: Path, ckpt: Ckpt) -> None:
    found = ckpt.json("ls", run, "--all")
    states = {(s["step"], s["generation"]): (s["state"], s["in_lineage"]) for s in found["steps"]}
    assert states == {
        (10, 1): ("whole", True),
        (20, 1): ("whole", True),
        (30, 1): ("outside the lineage", False),
        (40, 2): ("whole", True),
        (50, 2): ("half-written", False),
    }
    last, half = found["steps"][-2:]
    assert (last["ranks"], last["mesh"], last["whole"]) == (3, {"rank": 3}, True)
    assert abs(last["saved_s"] - time.time()) < 60
    assert last["size_bytes"] == sum(
        p.stat().st_size for p in Path(last["path"]).glob("*.safetensors")
    )
    assert (half["size_bytes"], half["saved_s"], half["whole"]) == (100, None, False)


def test_ls_tells_damage_and_lists_the_rest(run: Path, ckpt: Ckpt) -> None:
    spoil(manifest_of(run, StepId(1, 10)))
    folder = manifest_of(run, StepId(2, 40)).parent
    (folder / "rank-00001-0123abcd.safetensors").unlink()
    (folder / "rank-00002-0123abcd.safetensors").write_bytes(b"")
    found = ckpt.json("ls", run, code=1)
    ten, twenty, forty = found["steps"]
    assert "manifest" in ten["problem"]
    assert (ten["state"], ten["ranks"]) == ("damaged", None)
    assert twenty["whole"]
    assert forty["problem"] == "rank-00001-0123abcd.safetensors is missing (and 1 more)"
    assert "damaged: manifest: its checksum is" in ckpt("ls", run, code=1)


def test_ls_without_a_lineage_lists_all_that_is_committed(run: Path, ckpt: Ckpt) -> None:
    directory = CheckpointDirectory(run / "checkpoints")
    directory.create_generation(StepId(2, 40), {"rank": 1})
    spoil(run / "checkpoints" / "generations" / "00003.json")
    found = ckpt.json("ls", run, code=1)
    assert [(s["step"], s["in_lineage"]) for s in found["steps"]] == [
        (10, None),
        (20, None),
        (30, None),
        (40, None),
    ]
    assert "00003.json is damaged" in found["problem"]
    assert "00003.json is damaged" in ckpt.errors
    ckpt("gc", run, code=1)
    assert "nothing is deleted while" in ckpt.errors
    assert ckpt("verify", manifest_of(run, StepId(1, 30)).parent)


def test_an_empty_directory(tmp_path: Path, ckpt: Ckpt) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "no checkpoint yet" in ckpt("ls", tmp_path / "run")
    assert ckpt.json("ls", tmp_path / "run" / "checkpoints")["steps"] == []
    ckpt("inspect", tmp_path / "run", code=1)
    assert "has no checkpoint yet" in ckpt.errors


@pytest.mark.parametrize("command", ["ls", "inspect", "verify", "gc"])
def test_what_is_no_place_is_told_in_one_sentence(tmp_path: Path, ckpt: Ckpt, command: str) -> None:
    (tmp_path / "file").write_text("")
    for place, words in (
        (tmp_path, "holds no checkpoints"),
        (tmp_path / "missing", "is not a directory"),
        (tmp_path / "file", "is not a directory"),
        (tmp_path / "missing@5", "is not a directory"),
    ):
        assert ckpt(command, place, code=1) == ""
        assert ckpt.errors.startswith("error: ")
        assert words in ckpt.errors
        assert ckpt.errors.count("\n") == 1


def test_what_the_file_system_refuses_is_told_in_one_sentence(
    run: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr(CheckpointDirectory, "committed", refuse)
    for command, code in ((("ls", run), 1), (("verify", run), 1), (("diff", run, run), 2)):
        assert ckpt(*command, code=code) == ""
        assert ckpt.errors == "error: /some/file: Permission denied\n"


def test_which_step_is_meant(run: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = manifest_of(run, StepId(1, 30)).parent
    for arguments, step in (
        ((run,), 40),
        ((run, "--step", "20"), 20),
        ((f"{run}@10",), 10),
        ((f"{run}/checkpoints/@10",), 10),
        ((folder,), 30),
    ):
        assert ckpt.json("inspect", *arguments)["step"] == step
    monkeypatch.chdir(folder)
    assert ckpt.json("inspect", ".")["step"] == 30
    ckpt("inspect", run, "--step", "30", code=1)
    assert "has no checkpoint of step 30; it has: 10, 20, 40" in ckpt.errors
    ckpt("inspect", f"{run}@10", "--step", "20", code=1)
    ckpt("inspect", folder, "--step", "20", code=1)
    assert "is the directory of step 30" in ckpt.errors
    ckpt("gc", f"{run}@10", code=1)
    assert "is needed whole" in ckpt.errors


def test_a_directory_with_an_at_sign(run: Path, ckpt: Ckpt) -> None:
    odd = run.rename(run.with_name("run@20"))
    assert ckpt.json("inspect", odd)["step"] == 40
    assert ckpt.json("inspect", f"{odd}@20")["step"] == 20


def test_inspect(run: Path, ckpt: Ckpt) -> None:
    found = ckpt.json("inspect", run)
    assert (found["step"], found["generation"], found["mesh"]) == (40, 2, {"rank": 3})
    assert found["producer"] == {"everstep": "test"}
    assert found["objects"] == {"object.data": {"value": {"position": 40}}}
    assert [p["rank"] for p in found["packs"]] == [0, 1, 2]
    tensors = {t["name"]: t for t in found["tensors"]}
    assert list(tensors) == ["model.b", "model.w", "rng.rank0.x"]
    assert tensors["model.w"] == {
        "name": "model.w",
        "dtype": "F32",
        "shape": [6, 4],
        "size_bytes": 96,
        "layout": "grid 3x1",
        "packs": [0, 1, 2],
    }
    assert tensors["model.b"]["layout"] == "whole"
    assert found["totals"] == {"tensors": 3, "items": 24 + 5 + 9, "bytes": 96 + 40 + 9}
    only = ckpt.json("inspect", run, "--only", "*.w", "--only", "rng.*")
    assert [t["name"] for t in only["tensors"]] == ["model.w", "rng.rank0.x"]
    text = ckpt("inspect", run)
    assert "mesh       rank 3" in text
    assert 'object.data: {"value": {"position": 40}}' in text
    assert any(
        " ".join(line.split()) == "model.w F32 [6, 4] 96 bytes grid 3x1 0-2"
        for line in text.splitlines()
    )
    assert "3 tensors, 38 items, 145 bytes" in text


def test_inspect_one_tensor(run: Path, ckpt: Ckpt) -> None:
    found = ckpt.json("inspect", run, "--tensor", "model.w")
    assert [(b["offset"], b["shape"], b["flat"]) for b in found["boxes"]] == [
        ([0, 0], [2, 4], False),
        ([2, 0], [2, 4], False),
        ([4, 0], [2, 4], False),
    ]
    assert sorted(b["pack"] for b in found["boxes"]) == [0, 1, 2]
    assert "2:4, 0:4" in ckpt("inspect", run, "--tensor", "model.w")
    ckpt("inspect", run, "--tensor", "model.x", code=1)
    assert "no tensor 'model.x'" in ckpt.errors


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


def everstep_process(*arguments: str | Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "everstep", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("as_json", [False, True])
def test_a_broken_pipe_ends_it_quietly(tmp_path: Path, as_json: bool) -> None:
    directory = CheckpointDirectory(tmp_path / "checkpoints")
    directory.create_generation(None, {"rank": 1})
    many = {f"model.{n}": np.zeros(1, np.int8) for n in range(3000)}
    save_arrays(directory, StepId(1, 1), many)
    process = everstep_process("ckpt", "inspect", tmp_path, *(["--json"] if as_json else []))
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(60) in (0, 1)
    assert process.stderr.read() == b""
    process.stderr.close()


def test_ctrl_c_ends_it_without_a_traceback(run: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from everstep.checkpoint import verify\n"
        "from everstep.cli import main\n"
        "verify.crc32c_blocks = lambda *a, **k: os.kill(os.getpid(), signal.SIGINT)\n"
        "main(sys.argv[1:])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "ckpt", "verify", str(run)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 128 + signal.SIGINT
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "banned"),
    [
        (("ckpt", "--help"), {"torch", "numpy", "rich", "yaml"}),
        (("ckpt", "ls", "RUN"), {"torch", "yaml", "ray"}),
        (("ckpt", "ls", "RUN", "--json"), {"torch", "rich.table"}),
        (("ckpt", "verify", "RUN", "--digest"), {"torch", "ray"}),
        (("ckpt", "diff", "RUN@10", "RUN@10"), {"torch", "ray"}),
        (("ckpt", "gc", "RUN", "--dry-run"), {"torch", "ray"}),
    ],
)
def test_nothing_heavy_is_imported(run: Path, arguments: tuple[str, ...], banned: set[str]) -> None:
    code = (
        "import sys\n"
        "from everstep.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print('\\n' + ' '.join(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *(a.replace("RUN", str(run)) for a in arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.splitlines()[-1].split()) & banned
