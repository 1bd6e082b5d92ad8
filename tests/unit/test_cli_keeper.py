"""``everstep keeper``."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import everstep
from everstep.checkpoint.errors import KeeperError
from everstep.checkpoint.keeper import control
from everstep.checkpoint.keeper.place import KeeperPlace
from everstep.cli_keeper import describe_keeper, parse_size
from tests.support.cli import command, exit_code, wait_until
from tests.support.keepers import KeeperThread, eventually, processes_of, seal

ROOT = Path(everstep.__file__).parent.parent


def test_sizes() -> None:
    assert parse_size("64GiB") == 64 * 2**30
    assert parse_size("1.5 MiB") == 3 * 2**19
    assert parse_size("12345") == 12345
    for text in ("", "64GB", "-1", "many"):
        with pytest.raises(typer.BadParameter, match="expected such as 64GiB"):
            parse_size(text)


@pytest.mark.parametrize("name", ["start", "stop", "status"])
def test_help_teaches(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("keeper", name, "--help") == 0
    assert f"everstep keeper {name} --job run7" in capsys.readouterr().out


def test_status_is_readable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = KeeperPlace.of("job", tmp_path / "place")
    where = ["--place", place.root]
    assert exit_code("keeper", "status", *where) == 0
    assert capsys.readouterr().out == "no keeper is running here\n"
    assert exit_code("keeper", "status", "--job", "job", *where) == 1
    capsys.readouterr()
    with KeeperThread(place, budget_bytes=2**20) as keeper, keeper.connect() as memory:
        seal(memory.reserve(2**16, 2)[0], 41)
        memory.sealed(0, None)
        assert exit_code("keeper", "status", *where) == 0
        lines = capsys.readouterr().out.splitlines()
        assert exit_code("keeper", "status", "--job", "job", "--json", *where) == 0
        (found,) = json.loads(capsys.readouterr().out)
    assert lines == [
        f"job: process {os.getpid()}, 1 trainer, 128 KiB of 1 MiB in use",
        "  rank 0 slot 0: step 41, for 0 s (64 KiB)",
        "  rank 0 slot 1: nothing sealed (64 KiB)",
        "  flushes: 0 done, 0 failed",
    ]
    assert found["slots"][0]["step"] == 41
    found["flushes"]["running"] = [{"step": 3, "rank": 1}]
    found["flushes"]["last"] = {"error": "No space left on device"}
    assert describe_keeper(found).splitlines()[-2:] == [
        "  flushes: 0 done, 0 failed; under way: step 3 of rank 1",
        "  last flush failed: No space left on device",
    ]


def test_there_is_none_to_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("keeper", "stop", "--job", "job", "--place", tmp_path / "place") == 0
    assert capsys.readouterr().out == "there is no keeper of job job\n"
    assert exit_code("keeper", "stop", "--job", "a/b") == 1
    assert "cannot name a job" in capsys.readouterr().err


def test_it_stays_in_the_foreground_until_it_is_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "place"
    where = ["--job", "job", "--place", str(place)]
    with command("keeper", "start", "--foreground", *where, cwd=tmp_path) as started:
        assert wait_until(lambda: bool(control.all_status(place)), 30)
        assert exit_code("keeper", "start", "--memory-budget", "1GiB", *where) == 0
        assert "the keeper of job job is running already" in capsys.readouterr().out
        assert exit_code("keeper", "start", "--foreground", *where) == 1
        started.process.send_signal(signal.SIGTERM)
        assert started.wait(30) == 0
        started.assert_nothing_left()
        assert "asked to end" in started.output
    assert not list(processes_of(place))


def test_a_keeper_that_cannot_be_started_says_why(tmp_path: Path) -> None:
    place = tmp_path / "place"
    with pytest.raises(KeeperError, match=r"does not come up; .*no such program"):
        control.start("job", place=place, module="tests.support.broken_keeper", timeout_s=30)
    eventually(lambda: not list(processes_of(place)))
    assert sorted(p.name for p in (place / "job").iterdir()) == ["keeper.log", "lock"]


def test_a_keeper_is_light() -> None:
    code = """
import sys
import everstep.checkpoint.keeper.main
assert "numpy" not in sys.modules, "the supervisor does without"
import everstep.checkpoint.keeper.server
print(sorted({"torch", "ray", "typer", "rich", "pydantic", "yaml", "fsspec"} & set(sys.modules)))
"""
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert found.stdout == "[]\n"
