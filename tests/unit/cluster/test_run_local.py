"""The local launcher as a process: signals, kills, and what is left afterwards."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from everstep.checkpoint.errors import DirectoryInUseError
from everstep.cluster.run_dir import prepare_run_dir
from tests.support.launched import ROOT, Launched, wait_for


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def events(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def pids(run_dir: Path) -> list[int]:
    """Processes of the ranks, by rank: they report in any order."""
    started = [event for event in events(run_dir) if event["kind"] == "started"]
    by_rank = {int(str(event["rank"])): int(str(event["pid"])) for event in started}
    return [by_rank[rank] for rank in sorted(by_rank)]


def assert_free(run_dir: Path) -> None:
    """Another run can begin in the directory."""
    prepare_run_dir(run_dir, "").lock.release()


def test_a_whole_run(run_dir: Path) -> None:
    with Launched("train", run_dir, ranks=2) as launched:
        assert launched.wait() == 0, launched.errors
        lines = launched.output.splitlines()
        between = [f"step {step}/20 " for step in range(2, 20)]  # on a very busy machine
        assert [line for line in lines if not line.startswith(tuple(between))] == [
            f"fake: 20 steps on 2 ranks (mesh dp_shard 2), in {run_dir}",
            "corpus: 12 documents",
            "step 1/20 · loss 5.0000 · 12.3k tok/s · 20 ms/step",
            "step 20/20 · loss 0.2500 · 12.3k tok/s · 20 ms/step",
            "step 20 · held-out loss 1.5000",
            "saved step 20: 976.6 KiB in 100 ms → checkpoints/x",
            "what was trained",
            "what to try next",
        ]
        assert launched.errors == ""
        launched.assert_nothing_left()
    kinds = [event["kind"] for event in events(run_dir)]
    assert "step" not in kinds
    assert {"started", "message", "eval", "saved", "summary", "done", "state", "end"} <= set(kinds)
    states = [event["state"] for event in events(run_dir) if event["kind"] == "state"]
    assert states == ["running", "done"]
    assert sorted(path.name for path in (run_dir / "logs").iterdir()) == [
        "rank-00000.log",
        "rank-00001.log",
    ]
    assert "steps: 20" in (run_dir / "config.yaml").read_text()


def test_ranks_see_their_place(run_dir: Path) -> None:
    with Launched("describe", run_dir, ranks=2) as launched:
        assert launched.wait() == 0, launched.errors
        assert "[rank 1] printed by rank 1" in launched.output
    seen = [event for event in events(run_dir) if event["kind"] == "seen"]
    for event in seen:
        environment = event["environment"]
        assert isinstance(environment, dict)
        assert environment["RANK"] == environment["LOCAL_RANK"] == str(event["rank"])
        assert environment["WORLD_SIZE"] == environment["LOCAL_WORLD_SIZE"] == "2"
        assert int(environment["OMP_NUM_THREADS"]) >= 1
        assert event["sigint_ignored"] is True
        assert event["torch"] is False
    assert len(seen) == 2


@pytest.mark.parametrize("whole_group", [True, False])
def test_asked_to_stop_it_saves_and_exits_with_75(run_dir: Path, whole_group: bool) -> None:
    with Launched("train_long", run_dir) as launched:
        launched.wait_for_output("step 1/")
        if whole_group:
            launched.interrupt_group()
        else:
            launched.process.send_signal(signal.SIGTERM)
        assert launched.wait() == 75, launched.errors
        launched.assert_nothing_left()
        asked = "Ctrl-C" if whole_group else "SIGTERM"
        assert f"{asked}: finishing the step and saving, in at most 30 s" in launched.output
        assert "saved step" in launched.output
        assert "to go on from step " in launched.output.rstrip().splitlines()[-1]
        assert launched.errors == ""
    assert_free(run_dir)


def test_sigterm_to_everything_is_the_same(run_dir: Path) -> None:
    with Launched("train_long", run_dir) as launched:
        launched.wait_for_output("step 1/")
        os.killpg(launched.process.pid, signal.SIGTERM)
        assert launched.wait() == 75, launched.errors
        launched.assert_nothing_left()


def test_sigterm_to_one_rank_stops_all_that_agree(run_dir: Path) -> None:
    with Launched("train_long", run_dir, ranks=1) as launched:
        launched.wait_for_output("step 1/")
        os.kill(pids(run_dir)[0], signal.SIGTERM)
        assert launched.wait() == 75, launched.errors


def test_a_second_ctrl_c_stops_at_once(run_dir: Path) -> None:
    with Launched("hang_at_stop", run_dir) as launched:
        launched.wait_for_output("step 1/")
        launched.interrupt_group()
        launched.wait_for_output("Ctrl-C again stops at once")
        time.sleep(0.3)
        launched.interrupt_group()
        assert launched.wait() == 130, launched.errors
        launched.assert_nothing_left()
        assert "stopped at once, without saving" in launched.output
        assert launched.errors == ""
    assert_free(run_dir)


def test_ranks_that_hang_at_stop_are_killed_and_their_stacks_kept(run_dir: Path) -> None:
    with Launched("hang_at_stop", run_dir, grace_s=0.3) as launched:
        launched.wait_for_output("step 1/")
        launched.process.send_signal(signal.SIGTERM)
        assert launched.wait() == 1
        launched.assert_nothing_left()
        assert launched.errors.startswith(
            "error: ranks 0-1 did not finish the step and save within train.grace_s=0.3 seconds"
        )
    for log in (run_dir / "logs").iterdir():
        assert "in hang_at_stop" in log.read_text()


def test_sigkill_of_the_controller_leaves_nothing(run_dir: Path) -> None:
    with Launched("with_child", run_dir) as launched:
        wait_for(lambda: len(list(run_dir.glob("child-*"))) == 2, "children of ranks")
        assert len(launched.alive()) == 6  # controller, zygote, two ranks, a child of each
        launched.process.kill()
        launched.assert_nothing_left()
    assert_free(run_dir)


def test_sigkill_of_a_controller_that_ctrl_z_has_stopped_leaves_nothing(run_dir: Path) -> None:
    with Launched("with_child", run_dir) as launched:
        wait_for(lambda: len(list(run_dir.glob("child-*"))) == 2, "children of ranks")
        os.killpg(launched.process.pid, signal.SIGSTOP)
        launched.process.kill()
        launched.assert_nothing_left()
    assert_free(run_dir)


def test_sigkill_of_the_controller_while_it_starts_leaves_nothing(run_dir: Path) -> None:
    with Launched("hang_at_stop", run_dir) as launched:
        wait_for(lambda: len(launched.alive()) >= 2, "the first child")
        launched.process.kill()
        launched.assert_nothing_left()
    assert_free(run_dir)


def test_what_ranks_started_ends_with_them(run_dir: Path) -> None:
    with Launched("with_child", run_dir) as launched:
        wait_for(lambda: len(list(run_dir.glob("child-*"))) == 2, "children of ranks")
        os.kill(pids(run_dir)[1], signal.SIGKILL)
        assert launched.wait() == 1
        assert not launched.alive()
        assert launched.errors.startswith("error: rank 1 was killed by signal 9 (SIGKILL)")


def test_killed_ranks_start_again_and_nothing_of_the_first_ones_is_left(run_dir: Path) -> None:
    with Launched("dies_once", run_dir, ranks=2, restarts=3) as launched:
        assert launched.wait() == 0, launched.errors
        launched.assert_nothing_left()
        line = "rank 1 was killed (SIGKILL): starting all ranks again from the newest saved step,"
        assert f"{line} restart 1 of 3" in launched.output
        assert "step 20/20" in launched.output
        assert launched.errors == ""
    child = (run_dir / "child").read_text()
    assert not Path("/proc", child).exists()
    assert [event["attempt"] for event in events(run_dir) if event["kind"] == "restart"] == [1]


def test_losing_the_zygote_ends_the_run(run_dir: Path) -> None:
    with Launched("hang_at_stop", run_dir) as launched:
        launched.wait_for_output("step 1/")
        zygote = int(
            Path(f"/proc/{pids(run_dir)[0]}/stat").read_text().rpartition(")")[2].split()[1]
        )
        os.kill(zygote, signal.SIGKILL)
        assert launched.wait() == 1
        launched.assert_nothing_left()
        assert "error: the process that starts ranks ended (SIGKILL)" in launched.errors


def test_a_directory_in_use_is_refused(run_dir: Path) -> None:
    with prepare_run_dir(run_dir, ""), Launched("train", run_dir) as launched:
        assert launched.wait() == 1
        assert launched.errors.startswith(f"error: {run_dir} is in use by another job")
        assert len(launched.errors.splitlines()) == 1


def test_the_lock_is_held_as_long_as_any_rank_lives(run_dir: Path) -> None:
    with Launched("hang_at_stop", run_dir) as launched:
        launched.wait_for_output("step 1/")
        for pid in pids(run_dir):
            held = {os.path.realpath(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
            assert str(run_dir / "lock") in held
        with pytest.raises(DirectoryInUseError, match=str(launched.process.pid)):
            prepare_run_dir(run_dir, "")


def test_a_reader_that_goes_away_does_not_stop_the_run(run_dir: Path) -> None:
    program = [sys.executable, "-m", "tests.support.launched"]
    process = subprocess.Popen(
        [*program, "train", str(run_dir), "2", "5", "0", "local"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    process.wait(20)
    assert events(run_dir)[-1]["exit_code"] == 0
