import json
import math
from pathlib import Path
from typing import Any

import pytest

from everstep.trainer.events import EventLog


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_events_are_lines_of_json_with_a_time(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path, clock=lambda: 12.3456789) as log:
        log.append("saved", rank=0, step=3, path="a/b")
        assert read(path) == [
            {"time": 12.346, "kind": "saved", "rank": 0, "step": 3, "path": "a/b"}
        ]
        log.append("end")
    with EventLog(path) as log:
        log.append("start")
        log.close()
        log.append("too late")
    assert [event["kind"] for event in read(path)] == ["saved", "end", "start"]


def test_numbers_that_json_does_not_have_are_strings(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.append("eval", loss=math.nan, more=[math.inf, {"x": -math.inf, "y": 1.5}], at=path)
    (event,) = read(path)
    assert event["loss"] == "nan"
    assert event["more"] == ["inf", {"x": "-inf", "y": 1.5}]
    assert event["at"] == str(path)


def test_a_line_that_was_cut_by_a_kill_does_not_damage_the_next(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"time": 1, "kind": "a"}\n{"time": 2, "ki')
    with EventLog(path) as log:
        log.append("b")
        log.append("c")
    first, cut, *rest = path.read_text().splitlines()
    assert json.loads(first)["kind"] == "a"
    assert cut == '{"time": 2, "ki'
    assert [json.loads(line)["kind"] for line in rest] == ["b", "c"]


def test_a_log_that_cannot_be_opened_says_so_and_no_more(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.append("a")
    assert log.failure == f"events are missing from {tmp_path}: Is a directory"


def test_a_full_disk_does_not_raise() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with EventLog(full) as log:
        log.append("a")
        log.append("b")
    assert log.failure == "events are missing from /dev/full: No space left on device"
