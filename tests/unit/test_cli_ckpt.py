"""``everstep ckpt``: what people see, what programs get, and how it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import everstep
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.lineage import StepId
from tests.support.ckpt_runs import Ckpt, ckpt, manifest_of, run, spoil
from tests.support.stored import save_arrays

__all__ = ["ckpt", "run"]


ROOT = Path(everstep.__file__).parent.parent


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
    ckpt("inspect", run, "--only", "*.w", "--only", "rgn.*", code=2)
    assert ckpt.errors.startswith("error: --only: no tensor is named 'rgn.*'")
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
