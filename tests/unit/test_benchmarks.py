"""Parts of the benchmarks that decide something; the rest is run by ``make bench``."""

import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from everstep.checkpoint.torch_state import tensors_of
from everstep.trainer.config_load import load_config

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_gpu_benchmark_says_that_it_needs_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", ["gpu_train.py"])
    assert load("gpu_train").main() == 2
    assert "--device cpu --config debug_single" in capsys.readouterr().err


def test_the_gpu_benchmark_of_snapshots_says_that_it_needs_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", ["gpu_snapshot.py"])
    benchmark = load("gpu_snapshot")
    assert benchmark.main() == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_its_state_trains_and_is_one_of_everstep(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = load("gpu_snapshot")
    monkeypatch.setattr(benchmark, "WIDTH", 16)
    state = benchmark.state_of(3 * 16**2, "cpu")
    sizes = [t.local.nbytes for t in tensors_of(state).values()]
    assert sum(sizes) == 3 * 16**2 * (2 + 4 + 4 + 4)
    before = state.model[0].weight.clone()
    batch = torch.randn(4, 16, dtype=torch.bfloat16)
    for _ in range(5):
        benchmark.train_step(state, batch, repeats=2)
    master = state.optimizers[0].state[state.model[0].weight]["master"]
    assert not torch.equal(before.float(), master)
    assert torch.equal(master.to(torch.bfloat16), state.model[0].weight)


def test_the_gpu_benchmark_takes_few_micro_batches_and_leaves_warm_up_out() -> None:
    gpu_train = load("gpu_train")
    arguments = Namespace(warmup=2, steps=3, accumulate=4, device="cuda")
    changed = gpu_train.overrides_of(load_config("llama_1b", []), arguments, 2)
    assert "data.global_batch=32" in changed
    assert "train.steps=5" in changed
    lines = [
        {"loss": 1.0, "step_time_s": t, "tokens_per_s": 1 / t, "peak_memory_bytes": 100 + t}
        for t in (90.0, 80.0, 1.0, 2.0, 3.0)
    ]
    found = gpu_train.summarise(lines, arguments)
    assert found["step_time_s"][1] == 2.0
    assert found["first_step_s"] == 90.0
    assert found["peak_memory_bytes"] == 103
    assert "mfu" not in found


def test_a_variant_of_the_gpu_benchmark_that_takes_too_long_has_failed(tmp_path: Path) -> None:
    gpu_train = load("gpu_train")
    arguments = Namespace(config="debug_single", overrides=[], timeout_s=0.01)
    result = gpu_train.run_variant(arguments, [], tmp_path)
    assert result["error"] == ["not done after 0.01 s (--timeout-s)"]
    assert "failed (exit code None): not done after" in gpu_train.words("plain", result)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--blocks=1", "--blocks: got 1, expected at least 2: figures are quartiles"),
        ("--steps=0", "--steps: got 0, expected at least 1"),
    ],
)
def test_the_loop_benchmark_refuses_too_few_turns_before_it_starts(
    option: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["loop_overhead.py", option])
    with pytest.raises(SystemExit, match="2"):
        load("loop_overhead").main()
    assert expected in capsys.readouterr().err


def test_ratios_of_the_data_benchmark_are_of_neighbouring_turns() -> None:
    quartiles = load("data_limits").ratio_quartiles([1.0, 20.0, 3.0], [2.0, 10.0, 3.0])
    assert quartiles == [0.5, 1.0, 2.0]


@pytest.mark.slow
def test_the_checkpoint_benchmark_measures_every_way_and_checks_what_it_loads(
    tmp_path: Path,
) -> None:
    pytest.importorskip("tensorstore")
    out, folder = tmp_path / "result.json", tmp_path / "folder"
    folder.mkdir()
    command = [sys.executable, str(FOLDER / "checkpoint_io.py"), "--tiny"]
    done = subprocess.run(
        [*command, "--json", str(out), "--folder", str(folder)],
        env=os.environ | {"PYTHONPATH": str(FOLDER.parent)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    if "takes no O_DIRECT" in done.stderr:
        pytest.skip("the temporary folder is not on a disk")
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert {"cpu", "cores", "file_system"} <= report["hardware"].keys()
    assert report["tensors"] == 21
    kinds = [turn["kind"] for turn in report["turns"]]
    assert set(kinds) == {"save", "load warm", "load cold"}
    for turn in report["turns"]:
        assert turn["samples"]["cpu_s"][0] > 0
        assert turn["samples"]["wall_s"][0] > 0
    ours = [t for t in report["turns"] if t["way"] == "everstep"]
    assert {t["layout"] for t in ours} == {"4 row shards", "2x2 boxes", "tp2 x dp2", "1 rank"}
    assert all(t["samples"]["syncs"][0] > 2 for t in ours if t["kind"] == "save")
    assert "wanted" in done.stdout
    assert not any(folder.iterdir())


def test_rounds_of_the_checkpoint_benchmark_hold_the_same_turns_in_another_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    turns_of = load("checkpoint_io_turns")
    turns = turns_of.all_turns()
    assert len(set(turns)) == len(turns)
    orders = [turns_of.in_round(turns, number, 5) for number in range(5)]
    assert all(set(order) == set(turns) for order in orders)
    assert len({order[0] for order in orders}) == 5
    assert 1.0e9 < turns_of.FULL.size_bytes < 2.0e9
    assert len(turns_of.FULL.shapes()) == 300


def test_goals_of_the_checkpoint_benchmark_are_judged_by_the_median(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    report = load("checkpoint_io_report")
    turns_of = sys.modules["checkpoint_io_turns"]
    found = {t: report.Samples([1.0] * 3, [1.0] * 3) for t in turns_of.all_turns()}
    raw = next(t for t in found if t.kind == "save" and t.way == "raw O_DIRECT")
    found[raw] = report.Samples([0.5, 0.95, 2.0], [1.0] * 3)
    shown = {goal.claim: goal for goal in report.goals(found, [0.5])}
    saves = [goal for claim, goal in shown.items() if claim.startswith("save, 4")]
    assert saves[0].found == [0.725, 0.95, 1.475]
    assert saves[0].met
    assert not any(goal.met for claim, goal in shown.items() if "CPU of DCP" in claim)
    assert shown["plan of one rank's load, CPU seconds"].met


@pytest.mark.slow
def test_the_snapshot_benchmark_measures_every_way_beside_training_without(tmp_path: Path) -> None:
    out, folder = tmp_path / "result.json", tmp_path / "folder"
    folder.mkdir()
    command = [sys.executable, str(FOLDER / "snapshot_inflation.py"), "--tiny"]
    done = subprocess.run(
        [*command, "--json", str(out), "--dir", str(folder)],
        env=os.environ | {"PYTHONPATH": str(FOLDER.parent)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert {"cpu", "cores", "file_system"} <= report["hardware"].keys()
    measured = {"copy_floor", "memory", "durable", "torch_save", "dcp_best", "dcp_best_every_5"}
    measured |= {"disk_floor", "dcp_staging", "dcp_default", "dcp_sync"}
    assert measured <= report["inflation"].keys()
    assert ("dlrover" in report["inflation"]) != ("dlrover" in report["missing"])
    blocks = {block["way"]: block["ranks"] for block in report["blocks"]}
    assert all(len(ranks) == 2 for ranks in blocks.values())
    assert all(rank["details"]["newest_sealed"] == 105 for rank in blocks["memory"])
    assert all(rank["details"]["taken"] == 8 for rank in blocks["memory"])
    assert all(rank["details"]["newest_durable"] == 100 for rank in blocks["durable"])
    assert report["ways"]["memory"]["skipped"] == 0
    for found in report["ways"].values():
        assert found["step_s_quartiles"][0] > 0
        assert found["cpu_s_per_step"]["rank 1"] > 0
    assert "wanted" in done.stdout
    assert not any(folder.iterdir())


def test_rounds_of_the_snapshot_benchmark_hold_our_ways_and_let_peers_take_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    turns_of = load("snapshot_inflation_turns")
    rounds = [turns_of.ways_of_round(number, 2, ["dlrover"]) for number in range(6)]
    assert all(set(turns_of.CLOSELY) <= set(ways) for ways in rounds)
    assert all(len(ways) == 6 for ways in rounds)
    counts = {way: sum(way in ways for ways in rounds) for way in turns_of.PLANS}
    peers = {count for way, count in counts.items() if way not in (*turns_of.CLOSELY, "none")}
    assert peers == {0, 2}
    assert counts["dlrover"] == counts["none"] == 0
    assert set(turns_of.ways_of_round(0, 99)) == {*turns_of.PLANS} - {"none"}


def test_inflation_is_that_of_a_block_over_its_neighbours_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    report = load("snapshot_inflation_report")

    def block(way: str, *step_s: float) -> Any:
        seconds = {name: [0.0] * len(step_s) for name in report.MAIN_THREAD}
        ones = [1.0] * len(step_s)
        rank = {"step_s": [*step_s], "cpu_s": [*step_s], "helpers_cpu_s": ones, **seconds}
        memory = {"peak_bytes": 100 if way == "none" else 150, "mapped_shared_bytes": 40}
        rank |= memory | {"shared_bytes": 100, "helpers_bytes": 5, "skipped": 0, "details": {}}
        return report.Block(way=way, round=0, ranks=[rank, rank])

    blocks = [block("none", 1.0), block("dcp_best_every_5", 3.0, 1.0, 1.0, 1.0, 1.0)]
    paired = (3.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1.0, 2.0)
    blocks += [block("none", 1.8), block("copy_floor", *paired), block("none", 1.8)]
    trials = report.trials_of(blocks)
    assert list(trials) == ["copy_floor", "dcp_best_every_5"]
    found = report.summary("dcp_best_every_5", trials["dcp_best_every_5"], 20)
    assert found["inflation"] == pytest.approx(0.0)  # 1.4 s between 1.0 s and 1.8 s
    assert found["cpu_inflation_quartiles"][1] == pytest.approx(0.0)
    assert found["snapshots"] == 1
    assert found["extra_memory_bytes"] == 2 * 50 + (100 - 80) + 2 * 5
    floor = report.summary("copy_floor", trials["copy_floor"], 20)
    assert floor["inflation_samples"] == pytest.approx([0.0, 0.5])  # 2 s by 2 s, 1.5 s by 1 s
    assert floor["cpu_s_per_step"]["rank 0"] == pytest.approx(7 / 4)
    assert floor["snapshots"] == 4
    assert report.goals({"copy_floor": floor}) == []


def test_the_interval_of_a_median_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    report = load("snapshot_inflation_report")
    low, high = report.interval([0.01, 0.03, 0.02, 0.05, 0.04])
    assert 0.01 <= low <= 0.03 <= high <= 0.05
    assert report.interval([0.5]) == [0.5, 0.5]
