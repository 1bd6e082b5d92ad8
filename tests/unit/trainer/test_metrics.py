"""Where the numbers of a run go, also when it continues."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from everstep.trainer.config import RunConfig
from everstep.trainer.errors import ConfigError
from everstep.trainer.metrics import JsonlSink, TensorBoardSink, open_sinks, split_lines


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_full_precision_one_line_per_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, after_step=0)
    sink.write(1, {"loss": 0.1 + 0.2})
    assert lines_of(path) == [{"step": 1, "loss": 0.30000000000000004}]  # before close
    sink.write(2, {"loss": 1 / 3})
    sink.close()
    assert [line["loss"] for line in lines_of(path)] == [0.1 + 0.2, 1 / 3]


def test_steps_that_are_done_again_are_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonlSink(path, after_step=0)
    for step in (1, 2, 3, 4):
        first.write(step, {"loss": float(step)})
    first.close()
    with path.open("ab") as file:
        file.write(b'{"step": 5, "lo')  # torn by a kill
    again = JsonlSink(path, after_step=2)
    again.write(3, {"loss": 33.0})
    again.close()
    assert [(x["step"], x["loss"]) for x in lines_of(path)] == [(1, 1.0), (2, 2.0), (3, 33.0)]
    aside = lines_of(tmp_path / "metrics.superseded.jsonl")
    assert [x["step"] for x in aside] == [3, 4]


def test_what_is_no_metric_does_not_stop_a_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'\xff\xfe\n[1]\n{"step": "2"}\n{"step": 1, "loss": 2.0}\n')
    JsonlSink(path, after_step=1).close()
    assert lines_of(path) == [{"step": 1, "loss": 2.0}]
    assert split_lines("", 3) == ([], [])


def test_tensorboard_scalars_can_be_read_back(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sink = TensorBoardSink(tmp_path, after_step=0)
    for step in (1, 2):
        sink.write(step, {"loss": 4.0 / step, "lr": 0.5})
    sink.close()
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "lr"}
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 4.0), (2, 2.0)]


class Remembering:
    """A sink of one's own."""

    def __init__(self, config: RunConfig, run_dir: Path, after_step: int) -> None:
        self.made_with = (config.name, run_dir, after_step)
        self.written: list[tuple[int, dict[str, float]]] = []

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.written.append((step, dict(values)))

    def close(self) -> None:
        pass


def config_with(*sinks: str) -> RunConfig:
    return RunConfig.model_validate(
        {"name": "x", "train": {"steps": 1}, "metrics": {"sinks": list(sinks)}}
    )


def test_a_sink_of_ones_own(tmp_path: Path) -> None:
    config = config_with("jsonl", f"{__name__}:Remembering")
    jsonl, own = open_sinks(config, tmp_path, after_step=7)
    assert isinstance(jsonl, JsonlSink)
    assert own.made_with == ("x", tmp_path, 7)  # type: ignore[attr-defined]
    jsonl.close()


@pytest.mark.parametrize("name", ["jsnl", "no.such.module:make", "json:no_such_function"])
def test_an_unknown_sink_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=name.split(":")[0]):
        open_sinks(config_with(name), tmp_path, after_step=0)
