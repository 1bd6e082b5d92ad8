"""``everstep ckpt`` on the directory of a real run, as a user calls it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import cli

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(240)]


def ckpt(*arguments: str, cwd: Path, code: int = 0) -> Any:
    """What a command prints as JSON; its exit code has to be this."""
    found, output = cli.run("ckpt", *arguments, "--json", cwd=cwd)
    assert found == code, output
    return json.loads(output)


def test_the_checkpoints_of_a_run(small_run: Path) -> None:
    code, output = cli.run(
        *("train", "run.yaml", "mesh.tp=1", "train.steps=6", "checkpoint.every_steps=2"),
        *("--run-dir", "r"),
        cwd=small_run,
    )
    assert code == 0, output
    listed = ckpt("ls", "r", cwd=small_run)["steps"]
    assert [s["step"] for s in listed] == cli.committed_steps(small_run / "r")
    assert all((s["state"], s["ranks"]) == ("whole", 2) for s in listed)
    first, last = listed[0]["step"], listed[-1]["step"]

    found = ckpt("inspect", "r", "--only", "model.*", cwd=small_run)
    assert (found["step"], found["mesh"]["dp_shard"]) == (last, 2)
    assert "torch" in found["producer"]
    assert {t["dtype"] for t in found["tensors"]} == {"F32"}
    assert any(t["layout"] == "grid 2x1" and t["packs"] == [0, 1] for t in found["tensors"])

    verified = ckpt("verify", f"r@{first}", "--digest", cwd=small_run)
    assert verified["whole"]
    newest = ckpt("verify", "r", "--digest", cwd=small_run)
    assert verified["digest"]["state"] != newest["digest"]["state"]
    changed = ckpt("diff", f"r@{first}", "r", cwd=small_run, code=1)
    assert len([t for t in changed["tensors"] if t["name"].startswith("model.")]) == len(
        found["tensors"]
    )
    assert any(o["path"].startswith("object.") for o in changed["objects"])
    assert ckpt("diff", "r", "r/checkpoints", cwd=small_run)["equal"]

    gone = ckpt("gc", "r", "--keep", "1", cwd=small_run)["deleted"]
    assert [d["step"] for d in gone] == [s["step"] for s in listed[:-1]]
    assert cli.committed_steps(small_run / "r") == [last]
