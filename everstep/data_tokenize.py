"""``everstep data tokenize``: text to a folder of tokens, in parallel.

The folder is complete when its index is there; until then ``unfinished/`` notes which parts are
done, and the same command goes on from them. Nothing in it depends on the number of workers or on
how often the command was stopped.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from everstep.data_view import TokenizeDisplay, describe_folder
from everstep.data_workers import run_parts
from everstep.trainer.config import SourceConfig
from everstep.trainer.data.problems import unreadable
from everstep.trainer.data.rows import open_hf, open_parquet
from everstep.trainer.data.sources import TOKEN_INDEX, SourceFile, Sources, find_files
from everstep.trainer.data.stamps import replacing
from everstep.trainer.data.token_folder import (
    TOKENIZER_FILES,
    Recipe,
    TokenFolder,
    TokenizerFacts,
    encode_folder,
    read_folder,
    shard_is_intact,
)
from everstep.trainer.data.tokenize_plan import Part, Unit, part_bytes, plan_parts
from everstep.trainer.data.tokenize_work import UNFINISHED, Job, PartResult, done_before
from everstep.trainer.data.tokenizer import (
    BYTES,
    HfTokenizer,
    Tokenizer,
    open_tokenizer,
    token_dtype,
)
from everstep.trainer.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

_MOST_CUTS = 4096


def tokenize(
    source: SourceConfig,
    tokenizer_name: str,
    output: Path,
    *,
    workers: int | None,
    shard_tokens: int,
    console: "Console",
) -> None:
    """Tokenizes ``source`` into ``output``, or goes on where an earlier run was stopped.

    Args:
        source: Path, format, text_key, on_bad_rows and storage options; the rest is not looked at.
        tokenizer_name: As ``data.tokenizer``.
        output: A folder, made if missing.
        workers: Processes; None: one per core.
        shard_tokens: Most tokens in a shard.
        console: Where progress goes.

    Raises:
        DataError: the text cannot be read or has no documents, ``output`` cannot be written or
            holds something else, or another process is at it.
        KeyboardInterrupt: passed on; what is done so far stays, and is not done again.
    """
    tokenizer = open_tokenizer(tokenizer_name)
    recipe = _recipe(source, shard_tokens)
    if (output / TOKEN_INDEX).exists():
        _check_same(output, read_folder(output), recipe, tokenizer)
        shutil.rmtree(output / UNFINISHED, ignore_errors=True)
        console.print(f"'{output}' is complete already, nothing to do", soft_wrap=True)
        return
    sources = find_files(source, leave_out=output)
    if sources.is_tokens:
        raise DataError(f"{sources.name} holds tokens already: use it as data.source as it is")
    with _alone(output):
        units = measure(sources, shard_tokens)
        parts = plan_parts(units, shard_tokens)
        job = Job(
            output=str(output.resolve()),
            tokenizer=_absolute(tokenizer_name),
            tokenizer_digest=tokenizer.digest,
            text_key=source.text_key,
            on_bad_rows=source.on_bad_rows,
            shard_tokens=shard_tokens,
            storage_options=source.storage_options,
        )
        total_bytes = sum(part.size_bytes for part in parts)
        with TokenizeDisplay(console, len(parts), total_bytes) as display:
            results = _keep_done(job, parts, display)
            left = [part for part in parts if part.number not in results]
            results |= run_parts(job, left, _workers(workers, len(left)), display)
        index = _assemble(results, recipe, tokenizer)
        _finish(output, index, tokenizer, tokenizer_name)
    _tell(console, output, index, [results[number] for number in sorted(results)])


def measure(sources: Sources, shard_tokens: int) -> list[Unit]:
    """The files with their sizes and stamps, and where those that are too large can be cut."""
    sizes = [_size_bytes(sources, file) for file in sources.files]
    wanted = part_bytes(sum(sizes), shard_tokens)
    return [
        _unit(sources, file, size, cut=size > wanted)
        for file, size in zip(sources.files, sizes, strict=True)
    ]


def _unit(sources: Sources, file: SourceFile, size_bytes: int, cut: bool) -> Unit:
    storage = sources.storages.of(file.path)
    try:
        stamps = [storage.stamp(path) for path in file.members or (file.path,)]
        cuts: list[tuple[int, int]] = []
        if cut and file.format == "parquet":
            with storage.open(file.path, seek=True) as opened:
                metadata = open_parquet(opened, file.path).metadata
            groups = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
            scale = size_bytes / max(1, sum(groups))
            cuts = [(i, int(sum(groups[:i]) * scale)) for i in range(len(groups) + 1)]
        elif cut and file.format == "hf":
            rows = len(open_hf(file.path, sources.entry.storage_options))
            pieces = min(max(rows, 1), _MOST_CUTS)
            cuts = [(i * rows // pieces, i * size_bytes // pieces) for i in range(pieces + 1)]
    except OSError as error:
        raise unreadable(file.path, error) from error
    return Unit(
        path=file.path,
        format=file.format,
        named=file.named,
        size_bytes=size_bytes,
        stamps=tuple(stamp for stamp, _ in stamps),
        trusted=all(trusted for _, trusted in stamps),
        cuts=tuple(cuts),
        any_byte=cut and file.path.lower().endswith((".jsonl", ".ndjson")) and storage.can_seek(),
    )


def _size_bytes(sources: Sources, file: SourceFile) -> int:
    storage = sources.storages.of(file.path)
    try:
        return sum(storage.size_bytes(path) or 0 for path in file.members or (file.path,))
    except OSError as error:
        raise unreadable(file.path, error) from error


def _recipe(source: SourceConfig, shard_tokens: int) -> Recipe:
    return Recipe(
        sources=tuple([source.path] if isinstance(source.path, str) else source.path),
        format=source.format,
        text_key=source.text_key,
        on_bad_rows=source.on_bad_rows,
        shard_tokens=shard_tokens,
    )


def _check_same(output: Path, index: TokenFolder, recipe: Recipe, tokenizer: Tokenizer) -> None:
    if index.recipe != recipe or index.tokenizer.digest != tokenizer.digest:
        what = "another tokenizer"
        for name in Recipe.model_fields:
            if getattr(index.recipe, name) != getattr(recipe, name):
                what = f"{name.replace('_', ' ')} {getattr(index.recipe, name)!r}"
        raise DataError(
            f"'{output}' is complete already, made with {what}; choose another --output, or delete "
            "that folder"
        )


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Holds the lock of an unfinished folder; refuses one that holds other things."""
    unfinished = output / UNFINISHED
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not unfinished.exists() and any(output.iterdir()):
            raise DataError(
                f"'{output}' is not empty and holds no unfinished tokens: choose another --output"
            )
        unfinished.mkdir(exist_ok=True)
        lock = (unfinished / "lock").open("wb")
    except OSError as error:
        raise DataError(
            f"cannot write to '{output}': {error.strerror}; make room or permission there, or "
            "choose another --output"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"another everstep data tokenize is writing to '{output}': wait for it, or choose "
                "another --output"
            ) from error
        except OSError:  # no locks on this file system: whoever starts two writes the same twice
            pass
        yield


def _keep_done(job: Job, parts: Sequence[Part], display: TokenizeDisplay) -> dict[int, PartResult]:
    """Parts that an earlier run has done and whose shards are intact; all other shards go."""
    output = Path(job.output)
    results = {}
    for part in parts:
        result = done_before(job, part)
        if result is not None and all(shard_is_intact(output, shard) for shard in result.shards):
            results[part.number] = result
            display.done(part.size_bytes)
    kept = {shard.file for result in results.values() for shard in result.shards}
    for path in output.glob("tokens-*"):
        if path.name not in kept:
            path.unlink(missing_ok=True)
    display.kept(len(results))
    return results


def _assemble(results: dict[int, PartResult], recipe: Recipe, tokenizer: Tokenizer) -> TokenFolder:
    """The index of a folder whose parts are all done."""
    ordered = [results[number] for number in sorted(results)]
    shards = tuple(shard for result in ordered for shard in result.shards)
    if not shards:
        raise DataError(
            f"data.source: no text in {', '.join(recipe.sources)}; name files with at least one "
            "document"
        )
    dtype = token_dtype(tokenizer.vocab_size).newbyteorder("<").str
    return TokenFolder(
        dtype=cast(Literal["|u1", "<u2", "<u4"], dtype),
        documents=sum(result.documents for result in ordered),
        text_bytes=sum(result.text_bytes for result in ordered),
        bad_rows=sum(result.bad_rows for result in ordered),
        tokenizer=TokenizerFacts(
            kind="tokenizer.json" if isinstance(tokenizer, HfTokenizer) else "bytes",
            digest=tokenizer.digest,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
        ),
        recipe=recipe,
        shards=shards,
    )


def _finish(output: Path, index: TokenFolder, tokenizer: Tokenizer, name: str) -> None:
    """The tokenizer's copy, then the index: from here on the folder is complete."""
    try:
        if isinstance(tokenizer, HfTokenizer):
            contents = Path(name).expanduser().read_bytes()
            declared = json.dumps({"eos_token": tokenizer.eos_token}).encode() + b"\n"
            for file_name, data in zip(TOKENIZER_FILES, (contents, declared), strict=True):
                with replacing(output / file_name) as file:
                    file.write(data)
        with replacing(output / TOKEN_INDEX) as file:
            file.write(encode_folder(index))
    except OSError as error:
        raise DataError(
            f"cannot write to '{output}': {error.strerror}; make room there, and run the same "
            "command again"
        ) from error
    shutil.rmtree(output / UNFINISHED, ignore_errors=True)


def _tell(
    console: "Console", output: Path, index: TokenFolder, results: Sequence[PartResult]
) -> None:
    for line in describe_folder(output, index):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    examples = [example for result in results for example in result.bad_examples]
    if examples:
        console.print(f"  such as {examples[0]}", soft_wrap=True, markup=False, highlight=False)
    if skipped := [path for result in results for path in result.skipped]:
        console.print(
            f"{len(skipped)} files are not UTF-8 text and were left out, such as {skipped[0]}",
            soft_wrap=True,
            markup=False,
            highlight=False,
        )
    console.print(
        f"train on it:  data.source={output} data.tokenizer=auto",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )


def _workers(asked: int | None, parts: int) -> int:
    return min(asked or len(os.sched_getaffinity(0)), parts)


def _absolute(tokenizer: str) -> str:
    return tokenizer if tokenizer == BYTES else str(Path(tokenizer).expanduser().resolve())
