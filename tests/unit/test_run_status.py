"""``everstep status RUN_DIR``: read from a directory, and told."""

import json
from pathlib import Path
from typing import Any

import pytest

from everstep.run_status import describe_run
from everstep.trainer.config_load import dump_config, load_config
from tests.support.cli import exit_code

KEEPER: dict[str, Any] = {
    "job": "run-1",
    "pid": 12,
    "memory_bytes": 3 * 2**30,
    "budget_bytes": 4 * 2**30,
    "trainers": [{"rank": 0, "pid": 34}],
    "slots": [
        {"rank": 0, "index": 0, "step": 8, "sealed": True},
        {"rank": 0, "index": 1, "step": 9, "sealed": True},
        {"rank": 0, "index": 2, "step": None, "sealed": False},
    ],
    "flushes": {
        "running": [],
        "done": 2,
        "failed": 1,
        "last": {"step": 5, "seconds": 2.0, "bytes_per_s": 2**30, "error": None},
    },
    "counters": {
        "0": {
            "taken": 10,
            "skipped": 1,
            "last_skip": "no slot was free",
            "save_s": 0.01,
            "stall_s": 0.02,
            "copy_bytes_per_s": 2**30,
        }
    },
}
FACTS: dict[str, Any] = {
    "run_dir": "runs/a",
    "state": "running",
    "durable_step": 5,
    "restarts": 1,
    "last_restart": "rank 2 was killed",
    "keepers": [KEEPER],
}


def run_dir(folder: Path, *events: dict[str, Any]) -> Path:
    config = load_config("debug_single", ["checkpoint.memory=process"])
    (folder / "config.yaml").write_text(dump_config(config))
    lines = [json.dumps(event) for event in events]
    (folder / "events.jsonl").write_text("\n".join([*lines, '{"kind": "sav']))
    return folder


def test_what_keepers_hold_and_what_it_cost() -> None:
    assert describe_run(FACTS) == [
        "runs/a: running, step 5 is durable, 1 restart",
        "  last restart: rank 2 was killed",
        "keeper run-1: process 12, 1 rank connected, 3 GiB of 4 GiB",
        "  rank 0: holds 9, 8; 10 taken, 1 skipped (last: no slot was free), 3 ms of training each"
        ", copied at 1 GiB/s",
        "  to storage: 2 done, 1 failed; last: step 5 in 2.00 s, 1 GiB/s",
    ]


def test_a_flush_that_failed_says_why() -> None:
    last = {"step": 5, "error": "the disk is full"}
    keeper = {**KEEPER, "slots": [], "counters": {}}
    keeper["flushes"] = {"running": [{}], "done": 0, "failed": 1, "last": last}
    assert describe_run({**FACTS, "keepers": [keeper]})[-1] == (
        "  to storage: 0 done, 1 failed, 1 under way; last: the disk is full"
    )


def test_a_directory_is_told_of_by_its_newest_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_dir(
        tmp_path,
        {"kind": "placement"},
        {"kind": "saved", "step": 99},
        {"kind": "placement"},
        {"kind": "state", "state": "running", "reason": "all run"},
        {"kind": "saved", "step": 4},
        {"kind": "restart", "attempt": 1, "reason": "rank 1 was killed"},
        {"kind": "placement"},
        {"kind": "resumed", "step": 6},
        {"kind": "end", "exit_code": 75, "saved_step": 8},
    )
    assert exit_code("status", folder, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["durable_step"], told["resumed_step"], told["restarts"]) == (4, 6, 1)
    assert (told["exit_code"], told["keepers"]) == (75, [])
    assert exit_code("status", folder) == 0
    assert "no keeper of this run is on this host" in capsys.readouterr().out


def test_what_is_no_run_directory_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("status", tmp_path) == 1
    assert "there is no config.yaml in it" in capsys.readouterr().err
