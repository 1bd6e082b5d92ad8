"""A process that serves a run: its reports, its failures, and that it never stays."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from everstep.cluster.helper import Helper
from everstep.trainer.rank_spec import Report, Reporter, StopRequested

ROOT = Path(__file__).resolve().parents[3]
HERE = "tests.unit.cluster.test_helper"


def serve(subject: dict[str, str], report: Reporter, should_stop: StopRequested) -> int:
    """A helper that does what its subject says."""
    report({"kind": "serving", "subject": subject, "pid": os.getpid()})
    if subject["do"] == "fail":
        raise ValueError("boom")
    while not should_stop():
        time.sleep(0.02)
    return 0


def note_the_end(subject: dict[str, str]) -> None:
    """What such a helper does last."""
    Path(subject["file"]).write_text("ended")


def until(helper: Helper, count: int) -> list[Report]:
    found: list[Report] = []
    deadline_s = time.monotonic() + 20
    while len(found) < count:
        assert time.monotonic() < deadline_s
        found += helper.poll()
        time.sleep(0.02)
    return found


def test_it_serves_until_it_is_closed(tmp_path: Path) -> None:
    helper = Helper("the thing", f"{HERE}:serve", tmp_path / "log", subject={"do": "serve"})
    (report,) = until(helper, 1)
    assert report["subject"] == {"do": "serve"}
    assert helper.failure([]) is None
    helper.close(10)
    helper.close(10)
    assert not Path(f"/proc/{report['pid']}").exists()
    assert not (tmp_path / "log").exists()  # nothing was written into it


def test_its_error_is_a_sentence_and_its_trace_in_the_log(tmp_path: Path) -> None:
    helper = Helper("the thing", f"{HERE}:serve", tmp_path / "log", subject={"do": "fail"})
    reports = until(helper, 2)
    assert helper.failure(reports) == (
        f"the thing failed with ValueError: boom (full trace: {tmp_path}/log)"
    )
    helper.close(10)
    assert "in serve" in (tmp_path / "log").read_text()


def test_its_death_is_noticed(tmp_path: Path) -> None:
    helper = Helper("the thing", f"{HERE}:serve", tmp_path / "log", subject={"do": "serve"})
    (report,) = until(helper, 1)
    os.kill(report["pid"], signal.SIGKILL)
    deadline_s = time.monotonic() + 20
    while helper.failure(helper.poll()) is None:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    why = helper.failure([])
    assert why is not None
    assert why.startswith("the thing ended (SIGKILL): see ")
    helper.close(10)


def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from everstep.cluster.helper import Helper\n"
        f"from {HERE} import until\n"
        "folder, last_act = sys.argv[1:]\n"
        "subject = {'do': 'serve', 'file': folder + '/last'}\n"
        f"helper = Helper('x', '{HERE}:serve', Path(folder, 'log'), subject=subject,\n"
        "                last_act=last_act or None)\n"
        "print(until(helper, 1)[0]['pid'], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for last_act in ("", f"{HERE}:note_the_end"):
        process = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path), last_act],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert process.returncode == -signal.SIGKILL, process.stderr
        status = Path(f"/proc/{int(process.stdout)}/stat")
        deadline_s = time.monotonic() + 10
        while status.exists() and " Z " not in status.read_text():
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        assert (tmp_path / "last").exists() == bool(last_act)
