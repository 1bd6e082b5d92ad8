"""Where the numbers of a run go: sinks, chosen by name in ``metrics.sinks``."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from everstep.trainer.config import RunConfig
from everstep.trainer.errors import ConfigError
from everstep.trainer.factory import load_factory

METRICS_FILE = "metrics.jsonl"
SUPERSEDED_FILE = "metrics.superseded.jsonl"


class MetricSink(Protocol):
    """Takes the numbers of one step; only rank 0 has sinks."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step, by name; each step once, ascending."""
        ...

    def close(self) -> None:
        """No more steps come."""
        ...


def open_sinks(config: RunConfig, run_dir: Path, after_step: int) -> list[MetricSink]:
    """The sinks of a run that continues after a step (0: from the beginning).

    Raises:
        ConfigError: a sink's name is not known, or its library or factory cannot be loaded.
    """
    sinks: list[MetricSink] = []
    for name in config.metrics.sinks:
        if name == "jsonl":
            sinks.append(JsonlSink(run_dir / METRICS_FILE, after_step))
        elif name == "tensorboard":
            sinks.append(TensorBoardSink(run_dir / "tensorboard", after_step))
        else:
            make = load_factory(name, "metrics.sinks")
            sinks.append(make(config=config, run_dir=run_dir, after_step=after_step))
    return sinks


class JsonlSink:
    """One JSON object per step, numbers in full precision, one line written at a time.

    A run that continues after step k keeps the lines up to k; later ones, of steps that are done
    again, move to ``metrics.superseded.jsonl`` beside it, so that the file is one clean curve.
    """

    def __init__(self, path: Path, after_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept, superseded = split_lines(path.read_text(errors="replace"), after_step)
            if superseded:
                with path.with_name(SUPERSEDED_FILE).open("a") as f:
                    f.write("".join(superseded))
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(kept))
            os.replace(temporary, path)
        self._file = path.open("a", buffering=1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See ``MetricSink``."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        """See ``MetricSink``."""
        self._file.close()


def split_lines(text: str, after_step: int) -> tuple[list[str], list[str]]:
    """Lines of steps up to ``after_step``, and later ones; a torn last line is dropped (pure)."""
    kept: list[str] = []
    superseded: list[str] = []
    for line in text.splitlines(keepends=True):
        step = _step_of(line)
        if step is None:
            continue
        (kept if step <= after_step else superseded).append(line)
    return kept, superseded


def _step_of(line: str) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) and line.endswith("\n") else None


class TensorBoardSink:
    """Scalars for TensorBoard (extra ``[tensorboard]``)."""

    def __init__(self, folder: Path, after_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "metrics.sinks has 'tensorboard', which is not installed: pip install "
                "'everstep[tensorboard]', or take it out of metrics.sinks"
            ) from None
        make: Any = SummaryWriter
        self._writer = make(str(folder), purge_step=after_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See ``MetricSink``."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See ``MetricSink``."""
        self._writer.close()
