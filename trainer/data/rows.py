"""Documents that are rows of a file: lines of JSON, Parquet, Hugging Face datasets on disk.

Rows come one after the other, in the order of the file, with little of it in memory at any time.
A row that holds no text comes with what is wrong with it; a file that cannot be read at all, or
has no such column, is a DataError.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

from everstep.trainer.data.storage import is_url, resolve_options
from everstep.trainer.errors import DataError

BATCH_ROWS = 256
"""Rows that are decoded at once where the format allows to choose."""

_BUFFER_BYTES = 2**20


@dataclass(frozen=True)
class Row:
    """One document, or why a row is none."""

    place: str
    """Where in its file it is, for people."""
    text: bytes
    """UTF-8; empty where the row holds an empty text, or is bad."""
    problem: str = ""
    """What is wrong with it; empty if nothing."""


Done = Callable[[float], None]
"""Told from time to time which fraction of the rows has been read."""


def jsonl_rows(raw: IO[bytes], path: str, text_key: str) -> Iterator[Row]:
    """The rows of a file of JSON lines, decompressed by its suffix; empty lines do not count.

    Raises:
        DataError: the file is not compressed as its suffix says.
        OSError: it cannot be read.
    """
    try:
        with _decompressed(raw, path) as lines:
            numbered = ((f"line {n}", line) for n, line in enumerate(lines, 1))
            yield from parse_lines(numbered, text_key)
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if error.errno is None:  # bz2 and Arrow have no class of their own for damaged contents
            raise _damaged(path, error) from error
        raise


def lines_between(file: IO[bytes], start: int, stop: int) -> Iterator[tuple[str, bytes]]:
    """(place, line) of the lines whose first byte is one from ``start`` to before ``stop``."""
    file.seek(max(0, start - 1))
    if start:
        file.readline()  # the end of a line that began before, or nothing but its line end
    position = file.tell()
    while position < stop and (line := file.readline()):
        yield f"the line at byte {position}", line
        position += len(line)


def parse_lines(lines: Iterable[tuple[str, bytes]], text_key: str) -> Iterator[Row]:
    """Rows of (place, line) pairs."""
    for place, line in lines:
        if line.isspace():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Row(place, b"", f"is not JSON ({' '.join(str(error).split())})")
            continue
        if not isinstance(value, dict):
            yield Row(place, b"", f"is not a JSON object but {_kind(value)}")
        elif text_key not in value:
            keys = ", ".join(map(repr, list(value)[:8])) or "none"
            yield Row(place, b"", f"has no field {text_key!r} (its fields: {keys})")
        else:
            yield _text_row(place, value[text_key], text_key)


def parquet_rows(
    file: IO[bytes],
    path: str,
    text_key: str,
    done: Done = lambda fraction: None,
    row_groups: tuple[int, int] | None = None,
) -> Iterator[Row]:
    """Rows of a Parquet file, or of its row groups from one to before another.

    Raises:
        DataError: pyarrow is missing, the file is no Parquet, or has no such column of text.
        OSError: it cannot be read.
    """
    parquet = open_parquet(file, path)
    schema = parquet.schema_arrow
    if text_key not in schema.names:
        raise _no_column(path, text_key, schema.names)
    first, after = row_groups or (0, parquet.num_row_groups)
    before = sum(parquet.metadata.row_group(i).num_rows for i in range(first))
    total = sum(parquet.metadata.row_group(i).num_rows for i in range(first, after))
    number = before
    with _arrow_errors(path):
        batches = parquet.iter_batches(
            BATCH_ROWS, row_groups=list(range(first, after)), columns=[text_key]
        )
        for batch in batches:
            for value in batch.column(0).to_pylist():
                number += 1
                yield _text_row(f"row {number}", value, text_key)
            done((number - before) / total)


def open_parquet(file: IO[bytes], path: str) -> Any:
    """A ``pyarrow.parquet.ParquetFile`` that reads column pages as they are needed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"data.source: reading '{path}' needs the package 'pyarrow': install it with "
            "pip install 'everstep[parquet]'"
        ) from error
    with _arrow_errors(path):
        return pyarrow.parquet.ParquetFile(file, buffer_size=_BUFFER_BYTES)


def hf_rows(
    folder: str,
    options: dict[str, Any],
    text_key: str,
    done: Done = lambda fraction: None,
    part: tuple[int, int] | None = None,
) -> Iterator[Row]:
    """Rows of a dataset saved with ``save_to_disk``, or of a part of them, as its indices say.

    Raises:
        DataError: the package is missing, the folder cannot be loaded, or has no such column.
    """
    dataset = open_hf(folder, options)
    if text_key not in dataset.column_names:
        raise _no_column(folder, text_key, dataset.column_names)
    first, after = part or (0, len(dataset))
    if first == after:
        return
    chosen = dataset.with_format(None).select_columns([text_key])
    number = first
    for start in range(first, after, BATCH_ROWS):
        for value in chosen[start : min(start + BATCH_ROWS, after)][text_key]:
            number += 1
            yield _text_row(f"row {number}", value, text_key)
        done((number - first) / (after - first))


def open_hf(folder: str, options: dict[str, Any]) -> Any:
    """The ``datasets.Dataset`` in a folder."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data.source: reading '{folder}' needs the package 'datasets': install it with "
            "pip install 'everstep[hf]'"
        ) from error
    remote = {"storage_options": resolve_options(options)} if is_url(folder) else {}
    try:
        return datasets.load_from_disk(folder, **remote)
    except Exception as error:  # the library raises many kinds
        raise DataError(
            f"data.source: the dataset '{folder}' cannot be loaded "
            f"({' '.join(str(error).split())}); save it again with Dataset.save_to_disk"
        ) from error


def _text_row(place: str, value: Any, text_key: str) -> Row:
    if not isinstance(value, str):
        return Row(place, b"", f"has {_kind(value)} as {text_key!r}, not text")
    try:
        return Row(place, value.encode())
    except UnicodeEncodeError:  # JSON can spell out half a surrogate pair
        return Row(place, b"", f"has half a surrogate pair in {text_key!r}, which is no text")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    words = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return words.get(type(value), f"a value of type {type(value).__name__}")


def _decompressed(raw: IO[bytes], path: str) -> IO[bytes]:
    """The lines of a file, whatever its suffix says that it is compressed with."""
    name = path.partition("::")[0].partition("?")[0].lower()
    if name.endswith(".gz"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if name.endswith(".bz2"):
        return bz2.BZ2File(raw)
    if name.endswith(".xz"):
        return lzma.LZMAFile(raw)
    return _zstd(raw, path) if name.endswith(".zst") else raw


def _zstd(raw: IO[bytes], path: str) -> IO[bytes]:
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]

        return cast(IO[bytes], zstd.ZstdFile(raw))
    except ImportError:  # before Python 3.14
        pass
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            f"data.source: reading '{path}' before Python 3.14 needs the package 'pyarrow': "
            "install it with pip install 'everstep[parquet]'"
        ) from error
    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
    return cast(IO[bytes], io.BufferedReader(stream, _BUFFER_BYTES))


@contextlib.contextmanager
def _arrow_errors(path: str) -> Iterator[None]:
    """Errors of Arrow about a file's contents as DataErrors; other OSErrors pass."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if error.errno is None:
            raise _damaged(path, error) from error
        raise


def _damaged(path: str, error: BaseException) -> DataError:
    return DataError(
        f"data.source: '{path}' is damaged or not of its format ({' '.join(str(error).split())}); "
        "replace it, or leave it out"
    )


def _no_column(path: str, text_key: str, names: Iterable[str]) -> DataError:
    return DataError(
        f"data.source: '{path}' has no column {text_key!r}; set text_key to one of "
        f"{', '.join(map(repr, names)) or 'its columns (it has none)'}"
    )
