"""The examples do what they say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import cli

ROOT = Path(__file__).resolve().parents[2]
OWN_LOOP = [sys.executable, str(ROOT / "examples" / "own_loop.py"), "--steps", "600"]


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


@pytest.mark.chaos
def test_own_loop_killed_and_run_again_ends_as_if_it_was_not(tmp_path: Path) -> None:
    straight = subprocess.run(
        [*OWN_LOOP, "--directory", str(tmp_path / "a")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    ).stdout
    log = tmp_path / "log"
    again = [*OWN_LOOP, "--directory", str(tmp_path / "b")]
    with log.open("w") as out, subprocess.Popen(again, env=environment(), stdout=out) as killed:
        try:
            assert cli.wait_until(lambda: "step 39:" in log.read_text(), 60)
        finally:
            killed.kill()
    resumed = subprocess.run(
        again, env=environment(), capture_output=True, text=True, timeout=90, check=True
    ).stdout
    assert "starting at step 0" in straight
    assert "starting at step 0" not in resumed
    assert straight.splitlines()[-1].startswith("step 599: loss ")
    assert resumed.splitlines()[-1] == straight.splitlines()[-1]
