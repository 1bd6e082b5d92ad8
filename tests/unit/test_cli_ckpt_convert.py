"""``everstep ckpt export`` and ``import``: every format, read back by those whom it is for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.numpy import load_file

from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.convert.spec import packaged_specs
from everstep.checkpoint.lineage import StepId
from everstep.ckpt_convert import EXPORTS, IMPORTS
from tests.support.ckpt_runs import Ckpt, arrays, ckpt, manifest_of, run
from tests.support.stored import save_arrays

__all__ = ["ckpt", "run"]
FORTY = arrays(40.0)


def test_to_safetensors(run: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    made = ckpt.json("export", run, tmp_path / "w.safetensors", "--to", "safetensors")
    assert made == {"path": str(tmp_path / "w.safetensors"), "size_bytes": 96 + 40}
    found = load_file(tmp_path / "w.safetensors")
    assert set(found) == {"w", "b"}
    np.testing.assert_array_equal(found["w"], FORTY["model.w"])
    older = tmp_path / "older.safetensors"
    more = ("--what", "everything", "--dtype", "F64", "--budget-mib", "8")
    assert str(older) in ckpt("export", f"{run}@10", older, "--to", "safetensors", *more)
    found = load_file(older)
    assert set(found) == set(FORTY)
    np.testing.assert_array_equal(found["model.w"], arrays(10.0)["model.w"].astype(np.float64))


def test_to_torch(run: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    ckpt("export", run, tmp_path / "w.pt", "--to", "torch", "--dtype", "bf16")
    found = torch.load(tmp_path / "w.pt", weights_only=True)
    assert found["w"].dtype == torch.bfloat16
    assert torch.equal(found["b"], torch.arange(5))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_to_dcp_and_back(run: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    ckpt("export", run, tmp_path / "dcp", "--to", "dcp")
    state = {"model.w": torch.zeros(6, 4), "model.b": torch.zeros(5, dtype=torch.int64)}
    dcp.load(state, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    np.testing.assert_array_equal(state["model.w"].numpy(), FORTY["model.w"])
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    ckpt("import", tmp_path / "dcp", theirs, "--from", "dcp", code=1)
    assert "theirs exists and is never overwritten" in ckpt.errors
    assert not [*theirs.iterdir()]
    made = ckpt.json("import", tmp_path / "dcp", tmp_path / "back", "--from", "dcp")
    assert made["size_bytes"] > 0
    same = ckpt.json("diff", run, made["path"], "--only", "model.*")
    assert (same["equal"], same["compared"]) == (True, 2)


def test_to_zarr(run: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    pytest.importorskip("tensorstore")
    zarr = pytest.importorskip("zarr")
    ckpt("export", run, tmp_path / "w.zarr", "--to", "zarr", "--what", "model", "--level", "1")
    group = zarr.open_group(tmp_path / "w.zarr", mode="r")
    np.testing.assert_array_equal(group["w"][:], FORTY["model.w"])


def test_to_references(
    run: Path, tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    made = ckpt.json("export", ".", tmp_path / "refs.json", "--to", "zarr-references")
    assert made["size_bytes"] == (tmp_path / "refs.json").stat().st_size
    found = json.loads((tmp_path / "refs.json").read_text())
    assert found["templates"] == {"u": str(manifest_of(run, StepId(2, 40)).parent)}
    (key,) = [k for k in found["refs"] if "b/c" in k and "zarr.json" not in k]
    file, offset, length = found["refs"][key]
    data = Path(file.replace("{{u}}", found["templates"]["u"])).read_bytes()
    np.testing.assert_array_equal(
        np.frombuffer(data[offset : offset + length], "<i8"), FORTY["model.b"]
    )


def test_from_safetensors_by_a_spec(run: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    ckpt("export", run, tmp_path / "w.safetensors", "--to", "safetensors")
    (tmp_path / "spec.yaml").write_text(
        "name: mine\nrules:\n  - {logical: 'model.{rest*}', stored: '{rest*}'}\n"
    )
    given = ("--from", "safetensors", "--spec", tmp_path / "spec.yaml")
    made = ckpt.json("import", tmp_path / "w.safetensors", tmp_path / "back", *given)
    assert made["size_bytes"] == 96 + 40
    assert made["path"] == str(tmp_path / "back" / "step-00000000-g00001")
    assert ckpt.json("diff", run, tmp_path / "back", "--only", "model.*")["equal"]
    assert ckpt.json("ls", tmp_path / "back")["steps"][0]["step"] == 0


def test_what_cannot_be_is_told_in_one_sentence(run: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    (tmp_path / "taken").write_text("")
    for arguments, code, words in (
        (("export", run, "x", "--to", "gif"), 2, "--to: got 'gif', expected one of hf, "),
        (("import", run, "x", "--from", "gif"), 2, "--from: got 'gif', expected one of hf, "),
        (("export", run, "x", "--to", "dcp", "--dtype", "F32"), 2, "--to dcp does not take it"),
        (("export", run, "x", "--to", "torch", "--what", "all"), 2, "--what: got 'all'"),
        (("import", run, "x", "--from", "safetensors"), 2, "needs --spec"),
        (("export", run, "x", "--to", "hf", "--dtype", "bf17"), 2, "F64, F32, F16, BF16"),
        (("import", run, "x", "--from", "hf", "--dtype", "I8"), 2, "F64, F32, F16, BF16"),
        (("export", run, "s3://b/x", "--to", "hf"), 2, "TARGET: got s3://b/x, expected a path"),
        (("import", "s3://b/x", "x", "--from", "hf"), 2, "SOURCE: got s3://b/x, expected a path"),
        (
            ("import", run, "memory://x", "--from", "hf"),
            2,
            "PLACE: got memory://x, expected a path",
        ),
        (("import", "none", "x", "--from", "hf"), 1, "there is no none: give a"),
        (("import", "none", "x", "--from", "dcp"), 1, "none is no checkpoint of torch DCP: "),
        (("export", run, "x", "--to", "hf"), 1, ""),
        (("import", tmp_path, "x", "--from", "hf"), 1, ""),
        (("import", tmp_path, "x", "--from", "dcp"), 1, ""),
        (("export", run, tmp_path / "taken", "--to", "torch"), 1, "taken"),
        (("export", run, tmp_path / "taken", "--to", "dcp"), 1, "taken"),
        (("export", run, tmp_path / "taken", "--to", "zarr-references"), 1, "taken"),
        (("export", tmp_path, "x", "--to", "torch"), 1, "holds no checkpoints"),
    ):
        assert ckpt(*arguments, code=code) == ""
        assert ckpt.errors.startswith("error: ")
        assert ckpt.errors.count("\n") == 1
        assert words in ckpt.errors
    assert not any(Path(made).exists() for made in ("x", "s3:", "memory:"))
    assert (tmp_path / "taken").read_text() == ""


@pytest.mark.parametrize("to", [name for name in EXPORTS if name != "hf"])
def test_a_full_disk_is_told_in_one_sentence_and_nothing_is_left(
    to: str, small_disk: Path, tmp_path: Path, ckpt: Ckpt
) -> None:
    directory = CheckpointDirectory(tmp_path / "large")
    directory.create_generation(None, {"rank": 1})
    random = np.random.default_rng(0)  # does not compress
    large = {f"model.{i}": random.integers(0, 2**32, 2**18, np.uint32) for i in range(4)}
    save_arrays(directory, StepId(1, 1), large)
    if to == "zarr-references":
        (small_disk / "full").write_bytes(bytes(3 * 2**20))
    ckpt("export", tmp_path / "large", small_disk / "x", "--to", to, code=1)
    assert ckpt.errors == (
        f"error: {small_disk / 'x'} cannot be written: No space left on device; nothing of it was "
        "kept: make room, or choose another place\n"
    )
    assert {path.name for path in small_disk.iterdir()} <= {"full"}


def test_help_names_every_format(ckpt: Ckpt) -> None:
    assert ", ".join(packaged_specs()) in " ".join(ckpt("import", "--help").split())
    for command, known in (("export", EXPORTS), ("import", IMPORTS)):
        text = ckpt(command, "--help")
        for name, format in known.items():
            (line,) = [line for line in text.splitlines() if line.split()[:1] == [name]]
            assert " ".join(line.split()[1:]) == format.help
