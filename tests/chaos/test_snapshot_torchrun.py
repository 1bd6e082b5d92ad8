"""Workers of torchrun are killed, and started again by it: they go on from the keeper's memory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from everstep.checkpoint.open_place import open_place
from everstep.checkpoint.verify import verify_packs
from tests.support.keepers import eventually, processes_of

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "fsdp2_loop.py"


def _run(folder: Path, *command: str) -> str:
    """Standard output of a command that succeeds."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XDG_RUNTIME_DIR": str(folder),  # where keepers are, by default
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _torchrun(folder: Path, name: str, deaths: str = "") -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = ["--max-restarts", "3", "-m", "tests.support.doomed_loop", deaths, str(EXAMPLE)]
    options = ["--directory", name, "--steps", "80", "--keeper-job", name]
    return _run(folder, *launcher, *program, *options)


def _losses(output: str) -> dict[str, str]:
    return dict(re.findall(r"^step (\d+): loss (\S+)$", output, re.MULTILINE))


def test_killed_workers_of_torchrun(tmp_path: Path) -> None:
    outputs = {}
    for name, deaths in (("whole", ""), ("killed", "1@27,0@61")):
        _run(
            tmp_path, "-m", "everstep", "keeper", "start", "--job", name, "--memory-budget", "1GiB"
        )
        outputs[name] = _torchrun(tmp_path, name, deaths)
        status = _run(tmp_path, "-m", "everstep", "keeper", "status", "--job", name)
        assert status
        _run(tmp_path, "-m", "everstep", "keeper", "stop", "--job", name)
    starts = [
        int(step) for step in re.findall(r"^starting at step (\d+)$", outputs["killed"], re.M)
    ]
    # the last save before may not have been sealed by both; a checkpoint on disk is of step 50
    assert starts[0] == 0
    assert starts[1] in (26, 27)
    assert starts[2] in (60, 61)
    assert len(starts) == 3
    assert _losses(outputs["killed"]) == _losses(outputs["whole"])
    place = open_place(tmp_path / "killed")
    assert place.chosen().step == 79
    for step_id in place.directory.lineage():
        with place.open(step_id) as reader:
            assert not verify_packs(place.files(step_id), reader.manifest)
    eventually(lambda: not list(processes_of(tmp_path / "everstep")))
    left = sorted(p.name for p in (tmp_path / "everstep" / "killed").iterdir())
    assert left == ["keeper.log", "lock"]
