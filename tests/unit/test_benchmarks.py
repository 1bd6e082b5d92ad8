"""Parts of the benchmarks that decide something; the rest is run by ``make bench``."""

import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

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
