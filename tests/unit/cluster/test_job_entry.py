"""The script that a job begins with: run as a file, as on a cluster that may lack everything."""

import os
import signal
import subprocess
import time
import venv
from pathlib import Path

import pytest

from everstep.cluster import job_entry

SCRIPT = Path(job_entry.__file__)
PRETENDED = """
import signal, sys, time
print("arguments", sys.argv[1:], flush=True)
if sys.argv[1] == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    print("ready", flush=True)
    time.sleep(30)
if sys.argv[1] == "die":
    import os
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory in which everstep, torch and ray are to be found, after a fashion."""
    for name in ("everstep", "torch", "ray"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / "everstep" / "__main__.py").write_text(PRETENDED)
    (tmp_path / "job.py").write_text(SCRIPT.read_text())
    venv.create(tmp_path / "bare", symlinks=True)  # whatever is installed here is not in the way
    return tmp_path


def python_of(folder: Path) -> str:
    return str(folder / "bare" / "bin" / "python")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [python_of(folder), "job.py", "0.1.0", *arguments],
        cwd=folder,
        env={"PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    process = start(folder, *arguments)
    output, _ = process.communicate(timeout=30)
    return process.returncode, output


@pytest.mark.parametrize(("argument", "code"), [("0", 0), ("2", 2), ("75", 75), ("die", 137)])
def test_passes_arguments_and_exit_code(folder: Path, argument: str, code: int) -> None:
    found, output = run(folder, argument, "x y")
    assert found == code
    assert f"arguments ['{argument}', 'x y']" in output
    assert output.endswith(f"everstep job ended with exit code {code}\n")


def test_names_what_is_missing(folder: Path) -> None:
    (folder / "torch").rename(folder / "no_torch")
    (folder / "ray").rename(folder / "no_ray")
    code, output = run(folder, "0")
    assert code == 1
    first, *_ = output.splitlines()
    assert first.startswith("error: torch and ray cannot be imported by the job's Python")
    assert python_of(folder) in first
    assert "runtime env" in first
    assert "arguments" not in output


def test_hands_signals_on(folder: Path) -> None:
    process = start(folder, "wait")
    assert process.stdout is not None
    assert "arguments" in process.stdout.readline()
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    began_s = time.monotonic()
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 75, output
    assert time.monotonic() - began_s < 20


def test_version_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_entry.importlib.metadata, "version", lambda _: "0.2")
    assert job_entry.version_note("0.2") is None
    note = job_entry.version_note("0.1")
    assert note is not None
    assert "cluster has everstep 0.2; the job was submitted with 0.1" in note
