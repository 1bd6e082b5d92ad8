import json
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from everstep.cluster.errors import RankEnvironmentError
from everstep.cluster.external import library_environment, rank_spec
from everstep.trainer.rank_spec import RankSpec
from tests.support.launched import Launched

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "2",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def spec_of(environment: Mapping[str, str]) -> RankSpec:
    return rank_spec(environment, "yaml", Path("dir"), "auto")


def test_the_spec_of_a_rank_of_torchrun() -> None:
    assert spec_of(TORCHRUN) == RankSpec(
        config_yaml="yaml",
        run_dir="dir",
        rank=5,
        world_size=8,
        local_rank=1,
        local_world_size=4,
        attempt=2,
        resume="auto",
        store=None,
    )


def test_the_spec_of_a_rank_of_srun() -> None:
    spec = spec_of(SRUN)
    assert (spec.rank, spec.world_size, spec.local_rank, spec.local_world_size) == (2, 4, 0, 2)


def test_torchrun_inside_of_srun_wins() -> None:
    assert spec_of({**SRUN, **TORCHRUN}).rank == 5


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({}, "WORLD_SIZE is not set; start this command with torchrun or srun"),
        ({**TORCHRUN, "RANK": "x"}, "RANK is 'x', not a rank or size"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "LOCAL_RANK is not set"),
    ],
)
def test_an_environment_without_a_rank_is_refused(
    environment: dict[str, str], sentence: str
) -> None:
    with pytest.raises(RankEnvironmentError, match=sentence):
        spec_of(environment)


def test_libraries_get_what_the_launcher_did_not_set() -> None:
    added = library_environment(SRUN, threads=3)
    assert added["MASTER_ADDR"] == "n1"
    assert added["RANK"] == "2"
    assert added["OMP_NUM_THREADS"] == "3"
    assert library_environment({**TORCHRUN, "OMP_NUM_THREADS": "1"}, threads="auto") == {}
    assert int(library_environment(TORCHRUN, threads="auto")["OMP_NUM_THREADS"]) >= 1


def test_a_whole_run_shown_by_rank_0(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with Launched("train", run_dir, kind="external", environment=ALONE) as launched:
        assert launched.wait() == 0, launched.errors
        lines = launched.output.splitlines()
        assert lines[0] == f"fake: 20 steps on a single rank, in {run_dir}"
        assert lines[1] == "corpus: 12 documents"
        assert lines[-1] == "what to try next"
        assert launched.errors == ""
    kinds = [
        json.loads(line)["kind"] for line in (run_dir / "events.jsonl").read_text().splitlines()
    ]
    assert kinds == ["message", "eval", "saved", "summary", "done"]


def test_other_ranks_are_silent_and_leave_the_directory_to_rank_0(tmp_path: Path) -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    run_dir = tmp_path / "run"
    with Launched("train", run_dir, kind="external", environment=environment) as launched:
        assert launched.wait() == 0
        assert launched.output == launched.errors == ""
    assert not run_dir.exists()


def test_a_rank_tells_its_own_error_once(tmp_path: Path) -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    run_dir = tmp_path / "run"
    with Launched("rank_1_raises", run_dir, kind="external", environment=environment) as launched:
        assert launched.wait() == 1
        log = run_dir / "logs" / "rank-00001.log"
        assert launched.errors == (
            f"error: rank 1 failed with ValueError: boom (full trace: {log})\n"
        )
        assert "Traceback (most recent call last)" in log.read_text()
        assert launched.output == ""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_and_exits_with_75(tmp_path: Path, signum: signal.Signals) -> None:
    run_dir = tmp_path / "run"
    with Launched("train_long", run_dir, kind="external", environment=ALONE) as launched:
        launched.wait_for_output("step 1/")
        launched.process.send_signal(signum)
        assert launched.wait() == 75, launched.errors
        assert re.search(
            r"stopped, step (\d+) is saved\nto go on from step \1: start the same command again\n",
            launched.output,
        )


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with Launched("hang_at_stop", run_dir, kind="external", environment=ALONE) as launched:
        launched.wait_for_output("step 1/")
        launched.process.send_signal(signal.SIGINT)
        launched.wait_for_output("Ctrl-C: finishing the step and saving")
        time.sleep(1.1)
        launched.process.send_signal(signal.SIGINT)
        assert launched.wait() == 130


def test_a_rank_that_hangs_at_stop_ends_after_the_grace_time(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with Launched(
        "hang_at_stop", run_dir, kind="external", environment=ALONE, grace_s=0.3
    ) as launched:
        launched.wait_for_output("step 1/")
        launched.process.send_signal(signal.SIGTERM)
        assert launched.wait() == 1
        assert "train.grace_s=0.3" in launched.errors
    assert "hang_at_stop" in (run_dir / "logs" / "rank-00000.log").read_text()
