"""What ``everstep data`` shows: progress of tokenizing, and what a folder of tokens holds."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from everstep.trainer.data.token_folder import TokenFolder, read_folder
from everstep.trainer.data.token_source import verify_shards
from everstep.words import count_words

if TYPE_CHECKING:
    from rich.console import Console

_LINE_EVERY_S = 10.0


class TokenizeDisplay:
    """A bar on a terminal, a line now and then elsewhere; a context manager.

    ``doing`` says what is done with the bytes.
    """

    def __init__(
        self, console: "Console", parts: int, total_bytes: int, doing: str = "tokenizing"
    ) -> None:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._console = console
        self._doing = doing
        self._parts = parts
        self._parts_done = 0
        self._began_s = self._told_s = time.monotonic()
        self._before_bytes = 0
        self._bar = Progress(
            TextColumn(doing),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[parts]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total_bytes, parts="")

    def __enter__(self) -> "TokenizeDisplay":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def done(self, size_bytes: int) -> None:
        """A part was done before."""
        self._before_bytes += size_bytes
        self._bar.update(self._task, completed=self._before_bytes)

    def kept(self, parts: int) -> None:
        """So many parts were done before, and are intact."""
        self._parts_done = parts
        if parts:
            self._console.print(f"going on: {parts} of {self._parts} parts are done already")

    def read(self, size_bytes: int) -> None:
        """So many bytes more are dealt with."""
        self._bar.advance(self._task, size_bytes)
        now_s = time.monotonic()
        if not self._console.is_terminal and now_s - self._told_s > _LINE_EVERY_S:
            self._told_s = now_s
            self._console.print(self._line(now_s))

    def part_done(self) -> None:
        """One more part is done."""
        self._parts_done += 1
        self._bar.update(self._task, parts=f"part {self._parts_done} of {self._parts}")

    def _line(self, now_s: float) -> str:
        task = self._bar.tasks[0]
        total_bytes = max(1, int(task.total or 0))
        rate = max(1.0, (task.completed - self._before_bytes) / (now_s - self._began_s))
        left_s = max(0.0, (total_bytes - task.completed) / rate)
        percent = min(100, int(100 * task.completed / total_bytes))
        return f"{self._doing}: {percent} %, {rate / 1e6:.1f} MB/s, {left_s / 60:.0f} min left"


def describe_folder(path: Path, index: TokenFolder) -> Iterator[str]:
    """What a folder of tokens holds, one fact per line."""
    tokenizer = index.tokenizer
    sources, recipe = index.recipe.sources, index.recipe
    shown = ", ".join(sources[:4]) + (f" and {len(sources) - 4} more" if len(sources) > 4 else "")
    yield f"{path}: {index.tokens:,} tokens ({count_words(index.tokens)}) in {_shards(index)}"
    yield f"  documents  {index.documents:,}, {index.text_bytes:,} bytes of text"
    yield f"  type       {index.dtype.lstrip('<|')}, little-endian, {_bytes(index):,} bytes"
    yield (
        f"  tokenizer  {tokenizer.kind}, {tokenizer.vocab_size:,} ids, end of document "
        f"{tokenizer.eos_id}, digest {tokenizer.digest[:12]}"
    )
    yield f"  made from  {shown} (format {recipe.format}, text_key {recipe.text_key})"
    if index.bad_rows:
        yield f"  bad rows   {index.bad_rows:,} skipped"


def inspect(path: Path, *, verify: bool, console: "Console") -> dict[str, Any]:
    """The index of a folder and whether its shards are intact, as JSON has it.

    Raises DataError for whatever is damaged or missing.
    """
    index = read_folder(path)
    if verify:
        count = len(index.shards)
        with TokenizeDisplay(console, count, _bytes(index), doing="verifying") as display:
            verify_shards(path, index, display.read)
    return {
        **index.model_dump(mode="json"),
        "tokens": index.tokens,
        "digest": index.digest,
        "verified": verify,
    }


def show_folder(path: Path, *, verify: bool, console: "Console") -> str:
    """Text for people about a folder; raises DataError as ``inspect``."""
    inspect(path, verify=verify, console=console)
    lines = [*describe_folder(path, read_folder(path))]
    lines += ["  verified   every shard has the checksum of the index"] if verify else []
    return "".join(f"{line}\n" for line in lines)


def _shards(index: TokenFolder) -> str:
    return "1 shard" if len(index.shards) == 1 else f"{len(index.shards)} shards"


def _bytes(index: TokenFolder) -> int:
    return sum(map(index.shard_bytes, index.shards))
