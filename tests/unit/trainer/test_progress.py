import io
from typing import Any

import pytest
from rich.console import Console

from everstep.trainer.progress import (
    PLAIN_EVERY_S,
    Pace,
    ProgressView,
    clock_time,
    report_line,
    short_bytes,
    short_number,
    short_time,
    step_parts,
)


def step(number: int, steps: int = 100, **more: Any) -> dict[str, Any]:
    return {
        "kind": "step",
        "rank": 0,
        "step": number,
        "steps": steps,
        "loss": 2.5,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tokens_per_s": 12345.6,
        "step_time_s": 0.5,
        **more,
    }


def plain() -> tuple[ProgressView, io.StringIO]:
    output = io.StringIO()
    return ProgressView(Console(file=output, width=100), "demo"), output


def test_without_a_terminal_there_is_a_line_now_and_then() -> None:
    view, output = plain()
    with view:
        for number in range(1, 41):
            view.show(step(number), now_s=number * 0.5)
            view.refresh(number * 0.5)
    shown = [line.split(" · ")[0] for line in output.getvalue().splitlines()]
    each = int(PLAIN_EVERY_S / 0.5)
    assert shown == [f"step {number}/100" for number in (1, 1 + each, 1 + 2 * each, 31, 40)]
    assert output.getvalue().splitlines()[1].endswith("500 ms/step · ETA 0:44")


def test_the_last_step_is_shown_once() -> None:
    view, output = plain()
    with view:
        view.show(step(1, steps=2), now_s=0.0)
        view.show(step(2, steps=2), now_s=0.1)
    assert output.getvalue().splitlines() == [
        "step 1/2 · loss 2.5000 · 12.3k tok/s · 500 ms/step",
        "step 2/2 · loss 2.5000 · 12.3k tok/s · 500 ms/step",
    ]


def test_the_summary_comes_when_it_is_asked_for() -> None:
    view, output = plain()
    with view:
        view.show({"kind": "summary", "rank": 0, "lines": ["[bold]one[/]", "two"]}, now_s=0.0)
        assert output.getvalue() == ""
    view.show_summary()
    view.show_summary()
    assert output.getvalue() == "[bold]one[/]\ntwo\n"


@pytest.mark.parametrize(
    ("report", "line"),
    [
        ({"kind": "resumed", "step": 7, "path": "c/7"}, "resumed from step 7 (c/7)"),
        ({"kind": "eval", "step": 7, "loss": 2.25}, "step 7 · held-out loss 2.2500"),
        (
            {"kind": "saved", "step": 7, "path": "c/7", "bytes": 3 * 2**20, "seconds": 0.25},
            "saved step 7: 3.0 MiB in 250 ms → c/7",
        ),
        ({"kind": "message", "text": "hello"}, "hello"),
        ({"kind": "done", "step": 7}, None),
    ],
)
def test_other_reports_are_short_lines(report: dict[str, Any], line: str | None) -> None:
    assert report_line(report) == line
    view, output = plain()
    view.show(report, now_s=0.0)
    assert output.getvalue() == ("" if line is None else f"{line}\n")


def on_terminal(width: int = 100) -> tuple[ProgressView, io.StringIO]:
    output = io.StringIO()
    console = Console(file=output, width=width, force_terminal=True, color_system=None)
    return ProgressView(console, "a-name-that-is-much-too-long-for-a-bar"), output


@pytest.mark.parametrize("width", [40, 60, 80, 100, 250])
def test_on_a_terminal_a_bar_fits_the_line(width: int) -> None:
    view, output = on_terminal(width)
    with view:
        view.status("starting 4 ranks")
        view.refresh(0.0)
        assert "starting 4 ranks" in output.getvalue()
        for number in (123456, 123457):
            view.show(step(number, steps=1234567, loss=123.45678), now_s=float(number))
        output.truncate(0)
        view.refresh(1e6)
        frame = output.getvalue().rpartition("\r")[2].rpartition("K")[2].strip("\0\n")
        assert "step 123457/1234567" in frame
        assert len(frame) <= min(width, 100)
        assert width < 100 or "ETA 12 d" in frame
        assert width < 100 or "━" in frame


def test_on_a_terminal_other_lines_stay_above_the_bar() -> None:
    view, output = on_terminal()
    with view:
        view.show(step(1), now_s=0.0)
        view.refresh(0.0)
        view.line("hello")
        view.refresh(1.0)
    text = output.getvalue()
    assert text.count("hello") == 1
    assert text.rstrip().endswith("step 1/100 · loss 2.5000 · 12.3k tok/s · 500 ms/step")


def test_redrawing_is_limited() -> None:
    view, output = on_terminal()
    with view:
        view.show(step(1), now_s=0.0)
        view.refresh(0.0)
        size = len(output.getvalue())
        view.refresh(0.1)
        assert len(output.getvalue()) == size


def test_a_terminal_that_others_use_too_gets_lines() -> None:
    output = io.StringIO()
    console = Console(file=output, width=100, force_terminal=True, color_system=None)
    with ProgressView(console, "demo", live=False) as view:
        view.show(step(1), now_s=0.0)
    assert output.getvalue() == "step 1/100 · loss 2.5000 · 12.3k tok/s · 500 ms/step\n"


class _Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_console_that_is_gone_silences_the_view_only(terminal: bool) -> None:
    with ProgressView(Console(file=_Gone(), force_terminal=terminal, width=100), "demo") as view:
        view.line("one")
        view.show(step(1), now_s=0.0)
        view.refresh(1.0)
        view.line("two")


def test_pace_has_everything_in_it_that_takes_time() -> None:
    pace = Pace()
    assert pace.left_s(100) is None
    pace.update(10, now_s=0.0)
    assert pace.left_s(100) is None
    pace.update(20, now_s=10.0)
    assert pace.left_s(100) == pytest.approx(80)
    pace.update(21, now_s=21.0)
    assert pace.left_s(100) == pytest.approx(79 * (0.9 * 1 + 0.1 * 11))
    assert pace.left_s(5) == 0


def test_missing_numbers_are_left_out() -> None:
    assert step_parts({"step": 1, "steps": 2}, None) == ["step 1/2"]
    assert step_parts({"step": 1, "steps": 2, "loss": float("nan")}, 5.0)[1:] == [
        "loss nan",
        "ETA 0:05",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999.4, "999"), (999.9, "1k"), (1234, "1.23k"), (12345, "12.3k"), (2.5e9, "2.5G")],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short_number(value) == text


def test_short_quantities() -> None:
    assert [short_bytes(n) for n in (5, 1536, 2**30, 3 * 2**40)] == [
        "5 B",
        "1.5 KiB",
        "1.0 GiB",
        "3.0 TiB",
    ]
    assert [short_time(s) for s in (0.0123, 1.5, 75.4)] == ["12 ms", "1.50 s", "75 s"]
    assert [clock_time(s) for s in (42, 187, 8100, 273600)] == [
        "0:42",
        "3:07",
        "2:15:00",
        "3 d 4 h",
    ]


def test_mfu_is_shown_where_it_is_known() -> None:
    assert "52 % MFU" in step_parts(step(3, mfu=0.5249), None)
    assert not any("MFU" in part for part in step_parts(step(3), None))


def test_a_save_under_way_is_shown_now_and_then() -> None:
    view, output = plain()
    transfer = {"kind": "transfer", "rank": 0, "what": "saving step 1"}
    with view:
        view.show(step(1), now_s=0.0)
        for number in range(1, 30):
            view.show({**transfer, "bytes": number * 2**20}, now_s=number * 0.5)
    lines = output.getvalue().splitlines()
    assert lines[1:] == ["saving step 1: 10.0 MiB on rank 0", "saving step 1: 20.0 MiB on rank 0"]


def test_a_live_view_shows_a_save_until_it_is_done() -> None:
    output = io.StringIO()
    view = ProgressView(Console(file=output, width=100, force_terminal=True), "demo")
    with view:
        view.show({"kind": "transfer", "rank": 0, "what": "loading", "bytes": 3}, now_s=0.0)
        view.refresh(1.0)
        assert "demo: loading: 3 B on rank 0" in output.getvalue()
        view.show(step(7), now_s=1.0)
        view.show({"kind": "transfer", "rank": 0, "what": "saving", "bytes": 5}, now_s=2.0)
        view.refresh(2.0)
        assert "demo: step 7  saving: 5 B on rank 0" in output.getvalue()
        view.show(step(8), now_s=3.0)
        view.refresh(3.0)
    assert output.getvalue().rindex("step 8/100") > output.getvalue().rindex("saving")
