import pytest

from everstep.cluster.log_text import HOLD_S, LineMerger, TraceFilter, framed_trace

UNREACHABLE_S = 1e9


def shown(*lines: str) -> list[str]:
    text_filter = TraceFilter()
    return [line for raw in lines if (line := text_filter.feed(raw)) is not None]


def test_plain_lines_pass_without_control_characters() -> None:
    lines = shown("plain", "", "\x1b[31mred\x1b[0m\x07", "  indented")
    assert lines == ["plain", "red", "  indented"]


def test_of_a_bar_drawn_over_itself_the_last_state_is_shown() -> None:
    assert shown("10 %\r50 %\r100 %", "windows line\r") == ["100 %", "windows line"]


def test_framed_traces_are_not_shown() -> None:
    try:
        raise ValueError("boom")
    except ValueError as error:
        trace = framed_trace(error)
    assert "Traceback (most recent call last)" in trace
    assert "ValueError: boom" in trace
    assert shown("before", *trace.splitlines(), "after") == ["before", "after"]


def test_of_other_traces_the_last_line_is_shown() -> None:
    assert shown(
        "Exception in thread Thread-1:",
        "Traceback (most recent call last):",
        '  File "x.py", line 1, in f',
        "    g()",
        "    ~^^",
        "KeyError: 'x'",
        "",
        "During handling of the above exception, another exception occurred:",
        "",
        "[rank3]: Traceback (most recent call last):",
        '[rank3]:   File "y.py", line 2, in h',
        "[rank3]: ValueError: boom",
        "after",
    ) == [
        "Exception in thread Thread-1:",
        "KeyError: 'x'",
        "During handling of the above exception, another exception occurred:",
        "[rank3]: ValueError: boom",
        "after",
    ]


def test_of_crashes_in_native_code_the_first_line_is_shown() -> None:
    assert shown(
        "Fatal Python error: Segmentation fault",
        "",
        "Current thread 0x00007f1 (most recent call first):",
        '  File "x.py", line 1 in f',
        "  <no Python frame>",
        "Extension modules: numpy.core (total: 1)",
        "after",
        "Exception raised from recv at pair.cc:547 (most recent call first):",
        "frame #0: c10::Error::Error(...) + 0x57 (0x7f)",
        "frame #1: <unknown function> + 0x1 (0x7f)",
        "end",
    ) == ["Fatal Python error: Segmentation fault", "after", "end"]


def test_of_warnings_the_source_line_is_not_shown() -> None:
    assert shown("a.py:3: UserWarning: odd", "  f(x)", "  other") == [
        "a.py:3: UserWarning: odd",
        "  other",
    ]


def test_a_line_of_all_ranks_is_shown_once_and_at_once() -> None:
    merger = LineMerger(3)
    for rank in range(3):
        assert merger.take(0.0) == []
        merger.add(rank, "hello", 0.0)
    assert merger.take(0.0) == ["[all ranks] hello"]
    assert merger.take(UNREACHABLE_S) == []


def test_a_line_of_some_ranks_waits_a_moment_for_others() -> None:
    merger = LineMerger(4)
    merger.add(2, "hello", 0.0)
    merger.add(1, "hello", 0.1)
    assert merger.take(HOLD_S / 2) == []
    assert merger.take(HOLD_S) == ["[ranks 1-2] hello"]
    merger.add(3, "hello", 5.0)
    assert merger.take(UNREACHABLE_S) == []


def test_a_line_is_shown_as_often_as_the_rank_that_wrote_it_most() -> None:
    merger = LineMerger(2)
    for rank in (0, 0, 1, 0):
        merger.add(rank, "again", 0.0)
    assert merger.take(UNREACHABLE_S) == ["[all ranks] again", "[rank 0] again", "[rank 0] again"]


def test_lines_keep_their_order() -> None:
    merger = LineMerger(2)
    merger.add(0, "first", 0.0)
    merger.add(0, "second", 0.0)
    merger.add(1, "second", 0.0)
    assert merger.take(0.0) == []
    assert merger.take(HOLD_S) == ["[rank 0] first", "[all ranks] second"]


@pytest.mark.parametrize(
    "line",
    [
        "[rank{}]: text",
        "[W{}121 22:09:0{}.123 socket.cpp:1] text",
        "object at 0x7f{}",
        "worker (pid 12{}) text",
    ],
)
def test_lines_that_differ_in_volatile_parts_only_are_the_same(line: str) -> None:
    merger = LineMerger(2)
    for rank in range(2):
        merger.add(rank, line.format(rank, rank), 0.0)
    (only,) = merger.take(0.0)
    assert only.startswith("[all ranks] ")


def test_warnings_are_shown_once_ever() -> None:
    merger = LineMerger(2)
    for rank in (0, 0, 1, 0):
        merger.add(rank, "a.py:3: UserWarning: odd", 0.0)
    assert merger.take(UNREACHABLE_S) == ["[all ranks] a.py:3: UserWarning: odd"]


def test_a_single_rank_needs_no_label() -> None:
    merger = LineMerger(1)
    merger.add(0, "hello", 0.0)
    assert merger.take(0.0) == ["hello"]


def test_memory_is_bounded() -> None:
    merger = LineMerger(2)
    for number in range(6000):
        merger.add(0, f"line {number}", 0.0)
    assert len(merger.take(UNREACHABLE_S)) == 6000
    assert len(merger._counts) == len(merger._taken) == 5000
