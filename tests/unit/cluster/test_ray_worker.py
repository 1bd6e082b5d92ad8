"""What an actor does for its rank, built without Ray."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from everstep.cluster.keepers import NO_KEEPERS
from everstep.cluster.ray_worker import HostSetup, RankHost, installed_versions
from everstep.cluster.shared_dir import write_token
from everstep.trainer.rank_spec import RankSpec

ROOT = Path(__file__).resolve().parents[3]
Message = dict[str, Any]


def host(run_dir: Path, worker: str, *, rank: int = 0, **setup: Any) -> RankHost:
    (run_dir / "logs").mkdir(exist_ok=True)
    spec = RankSpec(
        config_yaml="",
        run_dir=str(run_dir),
        rank=rank,
        world_size=2,
        local_rank=rank,
        local_world_size=2,
        attempt=0,
        resume="auto",
        store=None,
    )
    known = HostSetup(
        cwd=os.getcwd(),
        token=None,
        node="here",
        address="127.0.0.1",
        one_host=True,
        versions=installed_versions(),
        target=f"tests.support.fake_workers:{worker}",
        preload=[],
        threads=1,
        keepers=asdict(NO_KEEPERS),
        silence_s=60.0,
    )
    return RankHost(asdict(known) | setup, asdict(spec))


def begin(rank: RankHost) -> threading.Thread:
    thread = threading.Thread(target=rank.run)
    thread.start()
    return thread


def messages(rank: RankHost, seen: int = 0) -> list[Message]:
    """All messages after the first ``seen``, to the last one."""
    found: list[Message] = []
    deadline_s = time.monotonic() + 40
    while not found or "exit" not in found[-1]:
        assert time.monotonic() < deadline_s, found
        found += map(json.loads, rank.take(seen + len(found), 1.0))
    return found


def reports(found: list[Message], kind: str) -> list[Message]:
    return [m["report"] for m in found if m.get("report", {}).get("kind") == kind]


def test_a_rank_runs_to_its_end(tmp_path: Path) -> None:
    rank = host(tmp_path, "describe", rank=1)
    thread = begin(rank)
    found = messages(rank)
    thread.join()
    assert found[-1]["exit"] == 0
    (seen,) = reports(found, "seen")
    assert seen["spec_rank"] == seen["rank"] == 1
    assert seen["environment"]["LOCAL_WORLD_SIZE"] == "2"
    assert seen["environment"]["OMP_NUM_THREADS"] == "1"
    assert seen["torch"] is False
    assert "printed by rank 1" in (tmp_path / "logs" / "rank-00001.log").read_text()


def test_what_was_not_seen_comes_again_and_large_reports_one_by_one(tmp_path: Path) -> None:
    rank = host(tmp_path, "big_reports")
    thread = begin(rank)
    thread.join()
    assert rank.take(0, 1.0) == rank.take(0, 1.0)
    first = rank.take(1, 1.0)
    assert [json.loads(text)["report"]["number"] for text in first] == [0]
    assert len(messages(rank, seen=1)) == 1 + 40 + 1 - 1


def test_asked_to_stop_before_it_runs(tmp_path: Path) -> None:
    rank = host(tmp_path, "train_long")
    rank.ask("stop")
    begin(rank).join()
    assert messages(rank)[-1]["exit"] == 75


def test_stacks_are_dumped(tmp_path: Path) -> None:
    rank = host(tmp_path, "train_long")
    thread = begin(rank)
    seen = 0
    while not seen:
        seen = len(rank.take(0, 1.0))
    rank.ask("dump")
    log = tmp_path / "logs" / "rank-00000.log"
    deadline_s = time.monotonic() + 20
    while "in _train" not in log.read_text():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    rank.ask("stop")
    thread.join()


def test_a_run_directory_that_this_node_does_not_see(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("everstep.cluster.shared_dir.SEEN_WITHIN_S", 0.0)
    rank = host(tmp_path / "..", "train", token="another")
    begin(rank).join()
    found = messages(rank)
    (error,) = reports(found, "error")
    assert error["type"] == "LaunchError"
    assert error["deliberate"] is True
    assert error["message"].startswith("node here does not see the run directory ")
    assert found[-1]["exit"] == 1


def test_another_version_is_refused(tmp_path: Path) -> None:
    token = write_token(tmp_path)
    rank = host(tmp_path, "train", token=token, versions={"torch": "1.0"})
    begin(rank).join()
    (error,) = reports(messages(rank), "error")
    assert "and this command runs with torch 1.0: install the same" in error["message"]


def test_a_rank_whose_controller_is_silent_ends_with_all_it_started(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.unit.cluster.test_ray_worker import host\n"
        "host(Path(sys.argv[1]), 'with_child', silence_s=3.0).run()\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
        check=False,
    )
    assert process.returncode == 1
    child = int((tmp_path / "child-0").read_text())
    assert not Path(f"/proc/{child}").exists()
