"""How a run shows itself: a live bar on a terminal, a plain line now and then elsewhere.

Fed with the reports of ranks (``trainer/rank_spec.py``); knows nothing of who sends them.
"""

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Report = Mapping[str, Any]

PLAIN_EVERY_S = 5.0
"""Least time between two lines about steps where there is no terminal."""
REFRESH_EVERY_S = 0.25
_WIDTH = 100
_SHORTEST_BAR = 8


class Pace:
    """Seconds per step as the clock on the wall has it, with evaluations and saves in it."""

    def __init__(self) -> None:
        self._last: tuple[int, float] | None = None
        self._seconds: float | None = None

    def update(self, step: int, now_s: float) -> None:
        """``step`` steps are done."""
        if self._last is not None and step > self._last[0]:
            seconds = (now_s - self._last[1]) / (step - self._last[0])
            known = self._seconds
            self._seconds = seconds if known is None else 0.9 * known + 0.1 * seconds
        self._last = (step, now_s)

    def left_s(self, steps: int) -> float | None:
        """Time until ``steps`` steps are done; None before two steps were seen."""
        if self._last is None or self._seconds is None:
            return None
        return max(0, steps - self._last[0]) * self._seconds


def step_parts(report: Report, left_s: float | None) -> list[str]:
    """The numbers of a step report, as a person reads them."""
    parts = [f"step {report['step']}/{report['steps']}"]
    if report.get("loss") is not None:
        parts.append(f"loss {report['loss']:.4f}")
    if report.get("tokens_per_s") is not None:
        parts.append(f"{short_number(report['tokens_per_s'])} tok/s")
    if report.get("step_time_s") is not None:
        parts.append(f"{short_time(report['step_time_s'])}/step")
    if report.get("mfu") is not None:
        parts.append(f"{100 * report['mfu']:.0f} % MFU")
    if left_s is not None and report["step"] < report["steps"]:
        parts.append(f"ETA {clock_time(left_s)}")
    return parts


def report_line(report: Report) -> str | None:
    """A line for a report that is worth one; None for the others."""
    match report["kind"]:
        case "resumed":
            line = f"resumed from step {report['step']} ({report['path']})"
            why = str(report.get("why") or "").removeprefix(f"step {report['step']} ")
            return f"{line}, which {why}" if why else line
        case "snapshots":
            return snapshot_words(report)
        case "not_saved":
            return f"training goes on, and later steps are tried as well: {report['why']}"
        case "eval":
            return f"step {report['step']} · held-out loss {report['loss']:.4f}"
        case "saved":
            size, took = short_bytes(report["bytes"]), short_time(report["seconds"])
            return f"saved step {report['step']}: {size} in {took} → {report['path']}"
        case "message":
            return str(report["text"])
    return None


def snapshot_words(report: Report) -> str:
    """How the snapshots of a run went, in one line."""
    skipped = f"{report['skipped']} skipped"
    if report["last_skip"]:
        skipped += f" (last: {report['last_skip']})"
    parts = [f"snapshots: {report['taken']} taken, {skipped}"]
    if report["seconds_per_step"] is not None:
        share = 100 * report["inflation"]
        parts.append(f"{short_time(report['seconds_per_step'])} of each step ({share:.1f} %)")
    memory = f"{short_bytes(report['memory_bytes'])} of host memory {report['where']}"
    if report["predicted_bytes"] is not None:
        memory += f" ({short_bytes(report['predicted_bytes'])} predicted)"
    parts.append(memory)
    parts += [f"step {report[name]} {name}" for name in ("sealed", "durable") if report[name]]
    return " · ".join(parts)


class ProgressView:
    """Shows the reports of one run on ``console``; a context manager.

    A console that breaks (closed pipe, terminal gone) silences the view, never the run. Nothing
    happens in the background: the owner calls ``refresh`` often. Without ``live`` there is no bar,
    for consoles that others write to as well.
    """

    def __init__(self, console: Console, name: str, *, live: bool = True) -> None:
        self._console = console
        self._name = name
        self._pace = Pace()
        self._status = ""
        self._transfer = ""
        self._step: Report | None = None
        self._step_shown: Any = None
        self._shown_at_s = float("-inf")
        self._live: Live | None = None
        self._summary: list[str] = []
        self._muted = False
        self._on_terminal = live and console.is_terminal and not console.is_dumb_terminal

    def __enter__(self) -> "ProgressView":
        if self._on_terminal:
            self._live = Live(
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._try(self._live.start)
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def status(self, text: str) -> None:
        """What is going on before the first step; only a live view shows it."""
        self._status = text

    def announce(self, text: str) -> None:
        """What is waited for, said often: a line for each new text where there is no live view."""
        if text != self._status and self._live is None:
            self.line(text)
        self._status = text

    def show(self, report: Report, now_s: float) -> None:
        """Take in a report; steps update the view, others may get a line of their own."""
        if report["kind"] == "transfer":
            self._show_transfer(report, now_s)
            return
        self._transfer = ""
        if report["kind"] == "step":
            self._pace.update(report["step"], now_s)
            self._step = report
            last = report["step"] >= report["steps"]
            first = self._step_shown is None
            due = now_s - self._shown_at_s >= PLAIN_EVERY_S
            if not self._on_terminal and (first or last or due):
                self._print_step(now_s)
        elif report["kind"] == "summary":
            self._summary += [str(line) for line in report["lines"]]
        elif (line := report_line(report)) is not None:
            self.line(line)

    def _show_transfer(self, report: Report, now_s: float) -> None:
        """A save or load under way: in the live view, or a line now and then."""
        self._transfer = f"{report['what']}: {short_bytes(report['bytes'])} on rank 0"
        if not self._on_terminal and now_s - self._shown_at_s >= PLAIN_EVERY_S:
            self._shown_at_s = now_s
            self.line(self._transfer)

    def line(self, text: str, style: str = "") -> None:
        """Print a line (above the bar, where there is one)."""
        self._try(lambda: self._console.print(Text(text, style=style), soft_wrap=True))

    def refresh(self, now_s: float) -> None:
        """Redraw the live view where it is due."""
        live = self._live
        if live is not None and now_s - self._shown_at_s >= REFRESH_EVERY_S:
            self._shown_at_s = now_s
            self._try(lambda: live.update(self._bar(), refresh=True))

    def close(self) -> None:
        """Take the bar away and show the last step for good; may be called twice."""
        live, self._live = self._live, None
        if live is not None:
            self._try(lambda: live.update(Text(""), refresh=True))
            self._try(live.stop)
        if self._step is not None and self._step is not self._step_shown:
            self._print_step(None)

    def show_summary(self) -> None:
        """Print the summary that the run reported, if it did."""
        lines, self._summary = self._summary, []
        for line in lines:
            self.line(line)

    def _print_step(self, now_s: float | None) -> None:
        assert self._step is not None
        left_s = None if now_s is None else self._pace.left_s(self._step["steps"])
        self.line(" · ".join(step_parts(self._step, left_s)))
        self._step_shown = self._step
        self._shown_at_s = self._shown_at_s if now_s is None else now_s

    def _bar(self) -> Table | Text:
        if self._step is None:
            return Text(f"{self._name}: {self._transfer or self._status}", style="dim")
        if self._transfer:
            return Text(f"{self._name}: step {self._step['step']}  {self._transfer}")
        step, steps = self._step["step"], self._step["steps"]
        text = "  ".join(step_parts(self._step, self._pace.left_s(steps)))
        name = self._name if len(self._name) <= 20 else f"{self._name[:19]}…"
        width = min(self._console.width, _WIDTH)
        room = width - len(text) - 2
        if room - len(name) - 1 < _SHORTEST_BAR:
            name = ""
        else:
            room -= len(name) + 1
        if room < _SHORTEST_BAR:
            return Text(text[:width])
        bar = ProgressBar(total=steps, completed=step, width=min(30, room))
        table = Table.grid(padding=(0, 1))
        table.add_row(*[Text(name, style="bold")] * bool(name), bar, Text(text))
        return table

    def _try(self, output: Callable[[], None]) -> None:
        """rich turns a broken pipe into SystemExit; other ends of a console are OSErrors."""
        if self._muted:
            return
        try:
            output()
        except (OSError, SystemExit):
            self._muted = True


def short_number(value: float) -> str:
    """1234567 -> '1.23M': three digits and a unit."""
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def short_bytes(value: int) -> str:
    """Bytes in the largest binary unit that leaves a whole part."""
    amount = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def short_time(seconds: float) -> str:
    """A duration with the precision that matters: '850 ms', '1.25 s', '75 s'."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"


def clock_time(seconds: float) -> str:
    """A time to wait: '0:42', '3:07', '2:15:00', '3 d 4 h'."""
    total = round(seconds)
    days, hours, minutes = total // 86400, total // 3600, total // 60
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours}:{minutes % 60:02d}:{total % 60:02d}"
    return f"{minutes}:{total % 60:02d}"
