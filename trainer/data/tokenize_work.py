"""What one process of ``everstep data tokenize`` does: parts of the text to shards of tokens."""

import hashlib
import io
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any

import numpy as np

from everstep.checkpoint.errors import EverstepError
from everstep.trainer.data.pieces import (
    PIECE_BYTES,
    Count,
    CountedFile,
    Piece,
    Tally,
    count_fractions,
    counted,
    pieces_of_file,
    pieces_of_rows,
    why_not_text,
)
from everstep.trainer.data.problems import changing, not_text, unreadable
from everstep.trainer.data.rows import Row, hf_rows, jsonl_rows, lines_between, parquet_rows
from everstep.trainer.data.rows import parse_lines as parse_json_lines
from everstep.trainer.data.stamps import read_record, replacing, write_record
from everstep.trainer.data.storage import Storages
from everstep.trainer.data.token_folder import Shard
from everstep.trainer.data.token_row import TokenArray
from everstep.trainer.data.tokenize_plan import Part, Span
from everstep.trainer.data.tokenizer import Tokenizer, open_tokenizer, token_dtype
from everstep.trainer.errors import DataError

UNFINISHED = "unfinished"
"""Folder in the output where the done parts are noted until all are."""

_REPORT_EVERY_S = 0.2
_TEMPORARY = "part"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all parts have in common; travels to the workers."""

    output: str
    tokenizer: str
    tokenizer_digest: str
    text_key: str
    on_bad_rows: str
    shard_tokens: int
    storage_options: dict[str, Any] = field(repr=False)

    @property
    def identity(self) -> str:
        """What of it decides the tokens."""
        facts = (self.tokenizer_digest, self.text_key, self.on_bad_rows, self.shard_tokens)
        return f"everstep tokenize 1 {facts}"


@dataclass(frozen=True, kw_only=True)
class PartResult:
    """What became of a part."""

    shards: tuple[Shard, ...]
    documents: int
    text_bytes: int
    bad_rows: int
    bad_examples: tuple[str, ...]
    skipped: tuple[str, ...]
    """Files in folders or globs that are not UTF-8 text."""


def tokenize_part(job: Job, part: Part, tokenizer: Tokenizer, advance: Count) -> PartResult:
    """Writes the shards of a part, and notes that it is done.

    Raises DataError: text that cannot be read or has changed, or shards that cannot be written.
    """
    tally = Tally()
    skipped: list[str] = []
    output = Path(job.output)
    pieces = _read_part(job, part, tally, skipped, advance)
    try:
        shards = _write_shards(output, part.number, job.shard_tokens, tokenizer, pieces)
    except OSError as error:
        raise DataError(
            f"cannot write tokens to '{output}': {error.strerror or error}; make room or "
            "permission there, and run the same command again to go on"
        ) from error
    result = PartResult(
        shards=tuple(shards),
        documents=tally.documents,
        text_bytes=tally.text_bytes,
        bad_rows=tally.bad_rows,
        bad_examples=tuple(tally.bad_examples),
        skipped=tuple(skipped),
    )
    if part.trusted:
        noted = asdict(result) | {"shards": [shard.model_dump() for shard in shards]}
        write_record(_note_path(output, part), {"key": part.key(job.identity), **noted})
    return result


def done_before(job: Job, part: Part) -> PartResult | None:
    """What an earlier run noted about a part, if it was this very part; shards are unchecked."""
    noted = read_record(_note_path(Path(job.output), part))
    if noted is None or noted["key"] != part.key(job.identity):
        return None
    return PartResult(
        shards=tuple(Shard(**shard) for shard in noted["shards"]),
        documents=noted["documents"],
        text_bytes=noted["text_bytes"],
        bad_rows=noted["bad_rows"],
        bad_examples=tuple(noted["bad_examples"]),
        skipped=tuple(noted["skipped"]),
    )


def work(connection: Connection, job: Job) -> None:
    """A worker process: parts come in, reports go out, until the other end is closed or dead."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core is enough
    threading.Thread(target=_end_with_parent, daemon=True).start()
    reported_s, waiting_bytes = time.monotonic(), 0

    def advance(size_bytes: int) -> None:
        nonlocal reported_s, waiting_bytes
        waiting_bytes += size_bytes
        if time.monotonic() - reported_s > _REPORT_EVERY_S:
            connection.send(("read", waiting_bytes))
            reported_s, waiting_bytes = time.monotonic(), 0

    try:
        tokenizer = open_tokenizer(job.tokenizer)
        while True:
            part = connection.recv()
            result = tokenize_part(job, part, tokenizer, advance)
            connection.send(("read", waiting_bytes))
            waiting_bytes = 0
            connection.send(("done", (part.number, result)))
    except EverstepError as error:
        connection.send(("error", error))
    except (EOFError, BrokenPipeError):
        return


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _note_path(output: Path, part: Part) -> Path:
    return output / UNFINISHED / f"part-{part.number:05d}"


def _write_shards(
    output: Path, number: int, most_tokens: int, tokenizer: Tokenizer, pieces: Iterator[Piece]
) -> list[Shard]:
    """Tokens of all pieces, in files of ``most_tokens`` each but the last."""
    shards: list[Shard] = []
    dtype = token_dtype(tokenizer.vocab_size).newbyteorder("<")
    arrays = _in_runs(tokenizer.tokenize(pieces), most_tokens)
    for run in arrays:
        name = f"tokens-{number:05d}-{len(shards):03d}.bin"
        hasher, count = hashlib.sha256(), 0
        with replacing(output / name, _TEMPORARY) as file:
            for array in run:
                data = array.astype(dtype, copy=False).data
                hasher.update(data)
                file.write(data)
                count += array.size
        shards.append(Shard(file=name, tokens=count, sha256=hasher.hexdigest()))
    return shards


def _in_runs(arrays: Iterator[TokenArray], most: int) -> Iterator[Iterator[TokenArray]]:
    """Cuts the tokens of ``arrays`` into runs of ``most``; read each to its end before the next."""
    left: TokenArray = np.empty(0, np.uint8)

    def run() -> Iterator[TokenArray]:
        nonlocal left
        count = 0
        while count < most:
            if not left.size:
                following = next(arrays, None)
                if following is None:
                    return
                left = following
            piece, left = left[: most - count], left[most - count :]
            count += piece.size
            yield piece

    while True:
        while not left.size:
            following = next(arrays, None)
            if following is None:
                return
            left = following
        yield run()


def _read_part(
    job: Job, part: Part, tally: Tally, skipped: list[str], advance: Count
) -> Iterator[Piece]:
    storages = Storages(job.storage_options)
    for span in part.spans:
        try:
            yield from _read_span(job, storages, span, tally, skipped, advance)
            _check_stamps(storages, span)
        except OSError as error:
            raise unreadable(
                span.path,
                error,
                "make it readable or leave it out, and run the same command again to go on",
            ) from error


def _read_span(
    job: Job,
    storages: Storages,
    span: Span,
    tally: Tally,
    skipped: list[str],
    advance: Count,
) -> Iterator[Piece]:
    storage = storages.of(span.path)
    skip_bad = job.on_bad_rows == "skip"
    if span.format == "hf":
        part = None if span.stop is None else (span.start, span.stop)
        done = count_fractions(span.size_bytes, advance)
        rows = hf_rows(span.path, job.storage_options, job.text_key, done, part)
        yield from pieces_of_rows(rows, span.path, skip_bad, tally)
        return
    if span.format == "text":
        problem = why_not_text(storage, span.path)
        if problem and span.named:
            raise not_text(span.path, problem)
        if problem:
            skipped.append(span.path)
            advance(span.size_bytes)
            return
    with storage.open(span.path, seek=span.format == "parquet" or span.stop is not None) as file:
        if span.format == "parquet":
            part = None if span.stop is None else (span.start, span.stop)
            done = count_fractions(span.size_bytes, advance)
            rows = parquet_rows(file, span.path, job.text_key, done, part)
        else:
            counting = io.BufferedReader(CountedFile(file, advance), PIECE_BYTES)
            if span.format == "text":
                yield from counted(pieces_of_file(counting), tally)
                return
            rows = _json_rows(counting, span, job.text_key)
        yield from pieces_of_rows(rows, span.path, skip_bad, tally)


def _json_rows(file: IO[bytes], span: Span, text_key: str) -> Iterator[Row]:
    if span.stop is None:
        return jsonl_rows(file, span.path, text_key)
    return parse_json_lines(lines_between(file, span.start, span.stop), text_key)


def _check_stamps(storages: Storages, span: Span) -> None:
    """The files were not changed while they were read, nor since the parts were planned."""
    paths = [span.path]
    storage = storages.of(span.path)
    if span.format == "hf":
        paths = sorted(storage.walk(span.path))
    now = tuple(storage.stamp(path)[0] for path in paths)
    if [list(stamp) for stamp in now] != [list(stamp) for stamp in span.stamps]:
        raise changing(span.path)
