import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from everstep.checkpoint.errors import DirectoryInUseError
from everstep.cluster import run_dir as module
from everstep.cluster.errors import RunDirError
from everstep.cluster.run_dir import prepare_run_dir


def test_a_prepared_directory_has_its_files(tmp_path: Path) -> None:
    with prepare_run_dir(tmp_path / "a" / "b", "name: x\n") as prepared:
        assert (prepared.path / "config.yaml").read_text() == "name: x\n"
        assert (prepared.path / "config.yaml").stat().st_mode & 0o777 == 0o644
        assert prepared.logs.is_dir()
        assert prepared.rank_log(3) == prepared.path / "logs" / "rank-00003.log"
        assert prepared.events == prepared.path / "events.jsonl"
    with prepare_run_dir(tmp_path / "a" / "b", "name: y\n") as prepared:
        assert (prepared.path / "config.yaml").read_text() == "name: y\n"
        assert not list(prepared.path.glob(".config*"))


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with prepare_run_dir(tmp_path, "first"):
        with pytest.raises(DirectoryInUseError, match=f"process {os.getpid()} on"):
            prepare_run_dir(tmp_path, "second")
        assert (tmp_path / "config.yaml").read_text() == "first"
    prepare_run_dir(tmp_path, "third").lock.release()


def test_a_directory_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunDirError, match=r"is a file.*--run-dir"):
        prepare_run_dir(tmp_path / "file", "")


def test_a_config_that_cannot_be_written_releases_the_lock(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").mkdir(parents=True)
    (tmp_path / "config.yaml" / "inside").touch()
    with pytest.raises(RunDirError, match="directory"):
        prepare_run_dir(tmp_path, "")
    assert not list(tmp_path.glob(".config*"))
    (tmp_path / "config.yaml" / "inside").unlink()
    (tmp_path / "config.yaml").rmdir()
    prepare_run_dir(tmp_path, "").lock.release()


@pytest.fixture
def gone_pid() -> int:
    """Id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(20)
    return process.pid


def held_by_ranks_of(pid: int, directory: Path) -> module.RunDir:
    """As after the kill of a launcher, whose ranks hold the lock still."""
    prepared = prepare_run_dir(directory, "old")
    holder = {"pid": pid, "host": socket.gethostname(), "since_s": 0.0}
    (directory / "lock").write_text(json.dumps(holder))
    return prepared


def test_ranks_of_a_killed_launcher_get_time_to_end(tmp_path: Path, gone_pid: int) -> None:
    held = held_by_ranks_of(gone_pid, tmp_path)
    release = threading.Timer(0.2, held.lock.release)
    release.start()
    prepare_run_dir(tmp_path, "new").lock.release()
    release.join()
    assert (tmp_path / "config.yaml").read_text() == "new"


def test_ranks_that_do_not_end_are_named(
    tmp_path: Path, gone_pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ENDING_S", 0.1)
    with held_by_ranks_of(gone_pid, tmp_path):
        began_s = time.monotonic()
        with pytest.raises(DirectoryInUseError, match="has ended, but ranks of it are still"):
            prepare_run_dir(tmp_path, "new")
        assert time.monotonic() - began_s < 5
