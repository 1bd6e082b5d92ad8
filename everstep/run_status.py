"""``everstep status RUN_DIR``: how a run on this host is, and what its keepers hold."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from everstep.cluster.errors import RunDirError
from everstep.cluster.keepers import run_status
from everstep.trainer.config_load import load_config
from everstep.trainer.progress import short_time
from everstep.words import plural, size_words


def show_run(run_dir: Path, *, as_json: bool) -> None:
    """Print it. Raises RunDirError, KeeperError."""
    facts = gather_run(run_dir)
    print(json.dumps(facts, indent=2) if as_json else "\n".join(describe_run(facts)))


def gather_run(run_dir: Path) -> dict[str, Any]:
    """What the events of a run tell, and how its keepers on this host are.

    Raises:
        RunDirError: it is no run directory.
        KeeperError: a keeper does not answer.
    """
    config_file = run_dir / "config.yaml"
    if not config_file.is_file():
        raise RunDirError(str(run_dir), f"there is no {config_file.name} in it")
    try:
        lines = (run_dir / "events.jsonl").read_text(errors="replace").splitlines()
    except FileNotFoundError:
        lines = []
    keepers = run_status(load_config(str(config_file)), run_dir)
    return {"run_dir": str(run_dir), **_told(_events(lines)), "keepers": keepers}


def describe_run(facts: Mapping[str, Any]) -> list[str]:
    """Lines for a person."""
    durable = facts["durable_step"]
    state = facts["state"] or "not started"
    lines = [
        f"{facts['run_dir']}: {state}, "
        f"{'nothing durable yet' if durable is None else f'step {durable} is durable'}, "
        f"{plural(facts['restarts'], 'restart')}"
    ]
    if facts["last_restart"] is not None:
        lines.append(f"  last restart: {facts['last_restart']}")
    for keeper in facts["keepers"]:
        lines += _keeper_lines(keeper)
    if not facts["keepers"]:
        lines.append("  no keeper of this run is on this host")
    return lines


def _events(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Events of the newest start; a line that is being written is left out."""
    found: list[dict[str, Any]] = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event.get("kind") == "placement" and found and found[-1].get("kind") != "restart":
            found = []
        found.append(event)
    return found


def _told(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def last(kind: str, key: str) -> Any:
        return next((e[key] for e in reversed(events) if e["kind"] == kind), None)

    return {
        "state": last("state", "state"),
        "durable_step": last("saved", "step"),
        "resumed_step": last("resumed", "step"),
        "restarts": sum(event["kind"] == "restart" for event in events),
        "last_restart": last("restart", "reason"),
        "exit_code": last("end", "exit_code"),
    }


def _keeper_lines(keeper: Mapping[str, Any]) -> list[str]:
    lines = [
        f"keeper {keeper['job']}: process {keeper['pid']}, "
        f"{plural(len(keeper['trainers']), 'rank')} connected, "
        f"{size_words(keeper['memory_bytes'])} of {size_words(keeper['budget_bytes'])}"
    ]
    held: dict[int, list[int]] = {}
    for slot in keeper["slots"]:
        if slot["sealed"]:
            held.setdefault(slot["rank"], []).append(slot["step"])
    for rank in sorted({*held, *map(int, keeper["counters"])}):
        steps = ", ".join(map(str, sorted(held.get(rank, []), reverse=True))) or "no step"
        lines.append(f"  rank {rank}: holds {steps}{_counted(keeper['counters'].get(str(rank)))}")
    flushes, last = keeper["flushes"], keeper["flushes"]["last"]
    line = f"  to storage: {flushes['done']} done, {flushes['failed']} failed"
    if flushes["running"]:
        line += f", {len(flushes['running'])} under way"
    if last is not None and last["error"] is None:
        rate = size_words(round(last["bytes_per_s"]))
        line += f"; last: step {last['step']} in {short_time(last['seconds'])}, {rate}/s"
    elif last is not None:
        line += f"; last: {last['error']}"
    return [*lines, line]


def _counted(stats: Mapping[str, Any] | None) -> str:
    """What a rank has told of its snapshots."""
    if not stats or not stats.get("taken"):
        return ""
    skipped = f"{stats['skipped']} skipped"
    if stats["last_skip"]:
        skipped += f" (last: {stats['last_skip']})"
    each_s = (stats["save_s"] + stats["stall_s"]) / stats["taken"]
    text = f"; {stats['taken']} taken, {skipped}, {short_time(each_s)} of training each"
    if stats["copy_bytes_per_s"]:
        text += f", copied at {size_words(round(stats['copy_bytes_per_s']))}/s"
    return text
