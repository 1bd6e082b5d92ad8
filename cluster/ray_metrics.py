"""Numbers of a run as metrics of Ray, which every node serves to Prometheus."""

from collections.abc import Mapping
from typing import Any

_GAUGES = {
    "step": ("everstep_step", "Optimizer updates that are done."),
    "loss": ("everstep_loss", "Training loss of the newest step, in nats per token."),
    "tokens_per_s": ("everstep_tokens_per_second", "Tokens trained per second, over all ranks."),
    "step_time_s": ("everstep_step_time_seconds", "Duration of the newest step."),
}


class RunMetrics:
    """Shows the step reports of rank 0; every metric has the run's name as its tag ``run``."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        self._gauges = {
            key: Gauge(name, description=text, tag_keys=("run",))
            for key, (name, text) in _GAUGES.items()
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run})

    def show(self, report: Mapping[str, Any]) -> None:
        """Take in a report of kind 'step'."""
        for key, gauge in self._gauges.items():
            value = report.get(key)
            if isinstance(value, int | float):
                gauge.set(value)
