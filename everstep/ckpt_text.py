"""Lines, tables, bars and words that the reports of ``everstep ckpt`` are made of."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from everstep.trainer.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

MAX_ROWS = 500
"""Of a table for people; a program takes them all as JSON."""
_PIPED_WIDTH = 10_000
_SHORT_CHARS = 100
_MAX_NAMES = 4
_UNITS_S = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def stdout_console() -> "Console":
    """Standard output; where it is no terminal, lines are as long as they need to be."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH)


def say(console: "Console", line: str) -> None:
    """One line as it is, not wrapped."""
    console.print(line, soft_wrap=True, markup=False, highlight=False)


def print_table(
    console: "Console",
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[int] = (),
) -> None:
    """A table without lines; nothing is cut off, it ends after ``MAX_ROWS`` rows, and says so."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, header in enumerate(headers):
        narrow = number in right
        justify: Literal["right", "left"] = "right" if narrow else "left"
        table.add_column(header, justify=justify, overflow="fold", no_wrap=narrow)
    for row in rows[:MAX_ROWS]:
        table.add_row(*map(Text, row))
    console.print(table)
    if len(rows) > MAX_ROWS:
        say(console, f"and {len(rows) - MAX_ROWS:,} more: --json has all of them")


@contextmanager
def byte_progress(what: str, total_bytes: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's error stream, to be told how many bytes are done so far.

    ``total_bytes`` is None where nobody knows it.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    bar = Progress(
        TextColumn(what),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=total_bytes)
        yield lambda done_bytes: bar.update(task, completed=done_bytes)


def matching(names: Mapping[str, Any], only: Sequence[str]) -> list[str]:
    """The names that match one of some patterns (``*``, ``?``, ``[…]``); all without any.

    Raises ConfigError for a pattern that matches no name: it is mistyped, and less would be looked
    at than was meant.
    """
    for pattern in only:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"--only: no tensor is named {pattern!r}: `everstep ckpt inspect` lists the names; "
                "* stands for any text"
            )
    return [n for n in names if not only or any(fnmatchcase(n, pattern) for pattern in only)]


def shape_words(shape: Sequence[int]) -> str:
    """'[4, 8]'."""
    return f"[{', '.join(map(str, shape))}]"


def ranges_words(numbers: Sequence[int]) -> str:
    """'0-3,7' of ascending numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "-"


def short(text: str) -> str:
    """The text, or its beginning."""
    return text if len(text) <= _SHORT_CHARS else f"{text[: _SHORT_CHARS - 1]}…"


def names_words(names: Sequence[str]) -> str:
    """'a, b, c, d and 7 more'."""
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def time_words(time_s: float | None) -> str:
    """Local time of seconds since the epoch; '-' for none."""
    if time_s is None:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))


def age_words(age_s: float) -> str:
    """'3 d', '5 min', '0 s'."""
    for unit, seconds in _UNITS_S:
        if age_s >= seconds:
            return f"{int(age_s / seconds)} {unit}"
    return "0 s"
