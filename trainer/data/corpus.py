"""A corpus: the tokens of all sources of ``data.source``, split for training and evaluation.

In a source of text, documents follow each other in an order that depends on their contents alone,
each with an end-of-document token (packing); the last ``data.held_out`` of every source's tokens
are held out. Tokens made here are cached in a folder that may be deleted at any time; nothing in
it is believed unchecked.
"""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from everstep.trainer.config import AUTO, DataConfig
from everstep.trainer.data.mixture import Mixture
from everstep.trainer.data.progress_meter import Meter, Progress
from everstep.trainer.data.sources import Sources, entries_of, find_files
from everstep.trainer.data.storage import is_url
from everstep.trainer.data.text_cache import TextCache
from everstep.trainer.data.token_folder import read_index
from everstep.trainer.data.token_row import TokenRow, Tokens, arrays_of, part_of
from everstep.trainer.data.token_source import TokenSource, open_token_source
from everstep.trainer.data.tokenizer import Tokenizer, open_tokenizer
from everstep.trainer.errors import DataError

_COUNT_AT_ONCE = 2**22


@dataclass(frozen=True, kw_only=True)
class CorpusPart:
    """The tokens of one source, and what they were made from."""

    name: str
    """For people: where they came from."""
    weight: float = 1.0
    """Share of the samples, relative to the other parts' weights."""
    tokens_train: Tokens
    """(N,) mapped read-only."""
    tokens_held_out: Tokens
    """(M,) likewise; empty if nothing is held out."""
    digest: str
    """Hex digest of every token, in order, and of the split: what a resumed run must find again."""
    text_digest: str
    """Hex digest of the documents' contents and order."""
    documents: int | None
    """None where nothing tells."""
    text_bytes: int
    """UTF-8 bytes of all documents; 0 where nothing tells."""
    skipped: tuple[str, ...] = ()
    """Files in folders or globs that were left out: unreadable, or not UTF-8 text."""
    bad_rows: int = 0
    """Rows that were skipped because they hold no text."""
    bad_examples: tuple[str, ...] = ()
    """What is wrong with the first of them."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Tokens to train on and to evaluate on: one part, or a mixture of several."""

    parts: tuple[CorpusPart, ...]
    tokenizer_digest: str
    """Hex digest of the tokenizer."""
    tokenizer: Tokenizer = field(repr=False)

    @property
    def name(self) -> str:
        """For people: where the text came from."""
        return ", ".join(part.name for part in self.parts)

    @property
    def tokens_train(self) -> Tokens:
        """(N,) the training tokens of all parts, one after the other."""
        return _joined([part.tokens_train for part in self.parts])

    @property
    def tokens_held_out(self) -> Tokens:
        """(M,) the held-out tokens of all parts, one after the other."""
        return _joined([part.tokens_held_out for part in self.parts])

    @property
    def digest(self) -> str:
        """Hex digest of every token, in order, of the splits, and of the mixture."""
        if len(self.parts) == 1:
            return self.parts[0].digest
        facts = ["everstep mixture 1", [part.digest for part in self.parts], self.shares]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def text_digest(self) -> str:
        """Hex digest of the documents' contents and order."""
        if len(self.parts) == 1:
            return self.parts[0].text_digest
        return hashlib.sha256("\n".join(p.text_digest for p in self.parts).encode()).hexdigest()

    @property
    def documents(self) -> int | None:
        """Documents of all parts; None where one cannot tell."""
        counts = [part.documents for part in self.parts]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all documents, as far as they are known."""
        return sum(part.text_bytes for part in self.parts)

    @property
    def skipped(self) -> tuple[str, ...]:
        """Files that were left out: unreadable, or not UTF-8 text."""
        return tuple(path for part in self.parts for path in part.skipped)

    @property
    def bad_rows(self) -> int:
        """Rows that were skipped because they hold no text."""
        return sum(part.bad_rows for part in self.parts)

    @property
    def shares(self) -> list[float]:
        """Share of the samples that comes from each part; their sum is 1."""
        return Mixture([part.weight for part in self.parts], 0).shares

    @property
    def vocab_size(self) -> int:
        """One more than the tokenizer's largest token id."""
        return self.tokenizer.vocab_size

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without an end of document."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; special tokens and ids that stand for nothing are left out."""
        return self.tokenizer.decode(ids)

    @cached_property
    def entropy_nats(self) -> float:
        """Unigram entropy of the training tokens: the loss of knowing their frequencies only."""
        frequencies = np.zeros(self.vocab_size)
        for part, share in zip(self.parts, self.shares, strict=True):
            counts = np.zeros(self.vocab_size, dtype=np.int64)
            for start in range(0, part.tokens_train.size, _COUNT_AT_ONCE):
                tokens = part.tokens_train[start : start + _COUNT_AT_ONCE]
                counts += np.bincount(tokens.astype(np.int64), minlength=self.vocab_size)
            frequencies += share * counts / part.tokens_train.size
        frequencies = frequencies[frequencies > 0]
        return float(-(frequencies * np.log(frequencies)).sum())


def open_corpus(
    config: DataConfig,
    cache_dir: Path,
    *,
    build: bool = True,
    progress: Progress | None = None,
    leave_out: Path | None = None,
) -> Corpus:
    """Opens the corpus of ``config``, tokenizing its text if the cache does not have it.

    Any number of processes may do this at once: one works, the others wait for it. Files are read
    again unless the file system says that they are the same as when they were last read (see
    ``stamps`` and ``storage``), so text that changed is noticed.

    Args:
        config: Section ``data`` of a run.
        cache_dir: Folder of the cache, made if missing.
        build: False: only open what the cache has.
        progress: Not called when there is nothing to read.
        leave_out: A folder whose files are not found by folders and globs: the run's own.

    Raises:
        DataError: text or tokenizer are missing, unreadable or too small for one global batch, or
            the cache cannot be written, or has no such tokens and ``build`` is False.
    """
    entries = entries_of(config.source)
    found = [find_files(entry, leave_out) for entry in entries]
    meter = Meter(sum(map(_work_bytes, found)), progress)
    opened = {
        number: open_token_source(sources, cache_dir, build, meter)
        for number, sources in enumerate(found)
        if sources.is_tokens
    }
    tokenizer = _choose_tokenizer(config, list(opened.values()))
    parts = []
    for number, (entry, sources) in enumerate(zip(entries, found, strict=True)):
        if number in opened:
            parts.append(_part_of_tokens(sources, opened[number], tokenizer, config.held_out))
        else:
            find = partial(find_files, entry, leave_out)
            cache = TextCache(cache_dir, sources, find, tokenizer, meter)
            parts.append(_part_of_text(sources, cache, build, tokenizer, config.held_out))
    corpus = Corpus(parts=tuple(parts), tokenizer_digest=tokenizer.digest, tokenizer=tokenizer)
    check_training_fits(corpus, config)
    return corpus


def vocab_size_of(config: DataConfig) -> int:
    """Ids of a run's tokenizer, without opening its corpus; 'auto' reads the index of a folder.

    Raises DataError.
    """
    if config.tokenizer != AUTO:
        return open_tokenizer(config.tokenizer).vocab_size
    for entry in entries_of(config.source):
        sources = find_files(entry)
        for file in sources.files:
            if file.format == "tokens":
                return read_index(sources.storages, file.path).tokenizer.vocab_size
    raise _no_tokenizer()


def samples_in(tokens: int, seq_len: int) -> int:
    """Samples of ``seq_len`` tokens, each with the token that follows it, in a row of tokens."""
    return max(0, tokens - 1) // seq_len


def check_training_fits(corpus: Corpus, config: DataConfig) -> None:
    """Raises DataError if the training tokens do not make one global batch, or a part no sample."""
    sizes = [part.tokens_train.size for part in corpus.parts]
    if sum(samples_in(size, config.seq_len) for size in sizes) < config.global_batch:
        raise DataError(
            f"the corpus is too small: {corpus.name} has {sum(sizes):,} tokens to "
            "train on, and one global batch needs data.global_batch x data.seq_len + 1 = "
            f"{config.global_batch * config.seq_len + 1:,}; add text to data.source, or lower "
            "data.global_batch or data.seq_len"
        )
    for part, size in zip(corpus.parts, sizes, strict=True):
        if not samples_in(size, config.seq_len):
            raise DataError(
                f"{part.name} has {size:,} tokens to train on, and one sample needs data.seq_len + "
                f"1 = {config.seq_len + 1:,}; add to it, leave it out, or lower data.seq_len"
            )


def check_held_out_fits(corpus: Corpus, config: DataConfig) -> None:
    """Raises DataError if the held-out tokens do not make one sample: nothing to evaluate on."""
    for part in corpus.parts:
        size = part.tokens_held_out.size
        if not samples_in(size, config.seq_len):
            raise DataError(
                f"evaluation is impossible: data.held_out={config.held_out:g} keeps {size:,} "
                f"tokens of {part.name}, and one sample needs data.seq_len + 1 = "
                f"{config.seq_len + 1:,}; raise data.held_out, add text, lower data.seq_len, or "
                "set train.eval_batches=0"
            )


def _choose_tokenizer(config: DataConfig, opened: Sequence[TokenSource]) -> Tokenizer:
    """The run's tokenizer, which must be that of all folders of tokens."""
    chosen = None if config.tokenizer == AUTO else open_tokenizer(config.tokenizer)
    name, way_out = f"data.tokenizer={config.tokenizer}", "set data.tokenizer=auto"
    for source in opened:
        if source.tokenizer is None:
            continue
        if chosen is None:
            chosen, name, way_out = source.tokenizer, source.tokenizer_at, "use one of them"
        elif chosen.digest != source.tokenizer.digest:
            raise DataError(
                f"the tokens of '{source.tokenizer_at}' were made with another tokenizer (digest "
                f"{source.tokenizer.digest[:12]}, {source.tokenizer.vocab_size:,} ids) than {name} "
                f"(digest {chosen.digest[:12]}, {chosen.vocab_size:,} ids); {way_out}, or make the "
                "tokens again with everstep data tokenize"
            )
    if chosen is None:
        raise _no_tokenizer()
    return chosen


def _no_tokenizer() -> DataError:
    return DataError(
        "data.tokenizer=auto takes the tokenizer of a folder made by everstep data tokenize, and "
        "data.source has none; name a tokenizer.json, or use 'bytes'"
    )


def _part_of_text(
    sources: Sources, cache: TextCache, build: bool, tokenizer: Tokenizer, held_out: float
) -> CorpusPart:
    texts, file = cache.load_or_build() if build else cache.load()
    n_train = file.tokens.size - int(file.tokens.size * held_out)
    facts = ["everstep corpus 1", file.sha256, file.tokens.dtype.str, file.tokens.size, n_train]
    facts += [tokenizer.vocab_size, tokenizer.eos_id]
    counts = file.facts
    return CorpusPart(
        name=sources.name,
        weight=sources.entry.weight,
        tokens_train=file.tokens[:n_train],
        tokens_held_out=file.tokens[n_train:],
        digest=hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
        text_digest=texts.digest,
        documents=counts.get("documents", len(texts.documents)),
        text_bytes=counts.get("text_bytes", texts.size_bytes),
        skipped=texts.skipped,
        bad_rows=counts.get("bad_rows", 0),
        bad_examples=tuple(counts.get("bad_examples", ())),
    )


def _part_of_tokens(
    sources: Sources, found: TokenSource, tokenizer: Tokenizer, held_out: float
) -> CorpusPart:
    size = found.tokens.size
    if found.largest_id >= tokenizer.vocab_size:
        raise DataError(
            f"data.source: {sources.name} holds the token {found.largest_id:,}, and the tokenizer "
            f"has {tokenizer.vocab_size:,} ids only; set data.tokenizer to the one that made it"
        )
    n_train = size - int(size * held_out)
    facts = ["everstep token corpus 1", found.digest, size, n_train]
    facts += [tokenizer.vocab_size, tokenizer.eos_id]
    return CorpusPart(
        name=sources.name,
        weight=sources.entry.weight,
        tokens_train=part_of(found.tokens, 0, n_train),
        tokens_held_out=part_of(found.tokens, n_train, size),
        digest=hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
        text_digest=found.digest,
        documents=found.documents,
        text_bytes=found.text_bytes,
        bad_rows=found.bad_rows,
    )


def _work_bytes(sources: Sources) -> int:
    """Bytes to read at most: text is read twice, tokens once, and twice where they are fetched."""
    total = 0
    for file in sources.files:
        if file.format == "tokens":
            index = read_index(sources.storages, file.path)
            size_bytes = sum(map(index.shard_bytes, index.shards))
        else:
            size_bytes = sum(_size_bytes(sources, p) for p in file.members or (file.path,))
        total += size_bytes * (1 if sources.is_tokens and not is_url(file.path) else 2)
    return total


def _size_bytes(sources: Sources, path: str) -> int:
    with contextlib.suppress(OSError):  # whoever reads it will say what is wrong
        return sources.storages.of(path).size_bytes(path) or 0
    return 0


def _joined(rows: Sequence[Tokens]) -> Tokens:
    return rows[0] if len(rows) == 1 else TokenRow([a for row in rows for a in arrays_of(row)])
