"""One writer per directory."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from everstep.checkpoint.errors import DirectoryInUseError
from everstep.checkpoint.lock import DirectoryLock

HOLDER = """
import os, sys, time
from pathlib import Path
from everstep.checkpoint.lock import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1]))
if len(sys.argv) > 2 and os.fork() == 0:
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(60)
os.write(1, b"held\\n")
time.sleep(60)
"""


def _hold(directory: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory), *args], stdout=subprocess.PIPE, text=True
    )


def test_the_second_is_told_who_holds_it(tmp_path: Path) -> None:
    with DirectoryLock(tmp_path / "new"):
        with pytest.raises(
            DirectoryInUseError, match=rf"process {os.getpid()} on .* since 20"
        ) as e:
            DirectoryLock(tmp_path / "new")
        assert e.value.directory == str(tmp_path / "new")
        DirectoryLock(tmp_path / "new", "another").release()


def test_it_is_free_after_release(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path)
    lock.release()
    lock.release()
    DirectoryLock(tmp_path).release()


def test_it_is_free_once_the_holder_was_killed(tmp_path: Path) -> None:
    with _hold(tmp_path) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(DirectoryInUseError, match=rf"process {holder.pid} on"):
            DirectoryLock(tmp_path)
        holder.kill()
        holder.wait()
        DirectoryLock(tmp_path).release()


def test_it_is_free_once_the_holder_was_killed_though_its_child_lives(tmp_path: Path) -> None:
    with _hold(tmp_path, "fork") as holder:
        assert holder.stdout is not None
        lines = sorted([holder.stdout.readline(), holder.stdout.readline()])
        child = int(lines[0])
        try:
            with pytest.raises(DirectoryInUseError, match=rf"process {holder.pid} on"):
                DirectoryLock(tmp_path)
            holder.kill()
            holder.wait()
            DirectoryLock(tmp_path).release()
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b'{"pid": 3}'])
def test_a_holder_that_left_no_word(tmp_path: Path, content: bytes) -> None:
    with DirectoryLock(tmp_path):
        (tmp_path / "lock").write_bytes(content)
        with pytest.raises(DirectoryInUseError, match="an unknown process"):
            DirectoryLock(tmp_path)


def test_the_file_says_when(tmp_path: Path) -> None:
    with DirectoryLock(tmp_path):
        year = time.strftime("%Y")
        with pytest.raises(DirectoryInUseError, match=f"since {year}-"):
            DirectoryLock(tmp_path)
