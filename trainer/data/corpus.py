"""A corpus: all text of ``data.source`` as one row of tokens, split for training and evaluation.

Documents follow each other in an order that depends on their contents alone, each with an
end-of-document token (packing); the last ``data.held_out`` of the tokens are held out. The tokens
are cached in a folder that may be deleted at any time; nothing in it is believed unchecked.
"""

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from everstep.trainer.config import DataConfig
from everstep.trainer.data.documents import (
    DocumentChangedError,
    Texts,
    decode_index,
    encode_index,
    identify,
    read_pieces,
)
from everstep.trainer.data.sources import Sources, find_files
from everstep.trainer.data.stamps import read_record, write_record
from everstep.trainer.data.token_file import (
    TokenFile,
    TokenFileKey,
    open_token_file,
    write_token_file,
)
from everstep.trainer.data.tokenizer import TokenArray, Tokenizer, open_tokenizer, token_dtype
from everstep.trainer.errors import DataError

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all). Text counts twice: to identify it, and to tokenize it."""

_COUNT_AT_ONCE = 2**22


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and to evaluate on, and what they were made from."""

    name: str
    """For people: where the text came from."""
    tokens_train: TokenArray
    """(N,) mapped read-only; uint8, uint16 or uint32."""
    tokens_held_out: TokenArray
    """(M,) likewise; empty if nothing is held out."""
    digest: str
    """Hex digest of every token, in order, and of the split: what a resumed run must find again."""
    text_digest: str
    """Hex digest of the documents' contents and order."""
    tokenizer_digest: str
    """Hex digest of the tokenizer."""
    documents: int
    text_bytes: int
    """UTF-8 bytes of all documents."""
    skipped: tuple[str, ...]
    """Files in folders or globs that were left out: unreadable, or not UTF-8 text."""
    tokenizer: Tokenizer = field(repr=False)

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
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for start in range(0, self.tokens_train.size, _COUNT_AT_ONCE):
            part = self.tokens_train[start : start + _COUNT_AT_ONCE]
            counts += np.bincount(part, minlength=self.vocab_size)
        frequencies = counts[counts > 0] / self.tokens_train.size
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
    ``stamps``), so text that changed is noticed.

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
    tokenizer = open_tokenizer(config.tokenizer)
    cache = _Cache(cache_dir, partial(find_files, config.source, leave_out), tokenizer, progress)
    texts, tokens = cache.load_or_build() if build else cache.load()
    corpus = _split(cache.sources.name, texts, tokenizer, tokens, config.held_out)
    check_training_fits(corpus, config)
    return corpus


def samples_in(tokens: int, seq_len: int) -> int:
    """Samples of ``seq_len`` tokens, each with the token that follows it, in a row of tokens."""
    return max(0, tokens - 1) // seq_len


def check_training_fits(corpus: Corpus, config: DataConfig) -> None:
    """Raises DataError if the training tokens do not make one global batch."""
    if samples_in(corpus.tokens_train.size, config.seq_len) < config.global_batch:
        raise DataError(
            f"the corpus is too small: {corpus.name} has {corpus.tokens_train.size:,} tokens to "
            "train on, and one global batch needs data.global_batch x data.seq_len + 1 = "
            f"{config.global_batch * config.seq_len + 1:,}; add text to data.source, or lower "
            "data.global_batch or data.seq_len"
        )


def check_held_out_fits(corpus: Corpus, config: DataConfig) -> None:
    """Raises DataError if the held-out tokens do not make one sample: nothing to evaluate on."""
    size = corpus.tokens_held_out.size
    if not samples_in(size, config.seq_len):
        raise DataError(
            f"evaluation is impossible: data.held_out={config.held_out:g} keeps {size:,} tokens of "
            f"{corpus.name}, and one sample needs data.seq_len + 1 = {config.seq_len + 1:,}; raise "
            "data.held_out, add text, lower data.seq_len, or set train.eval_batches=0"
        )


def _split(
    name: str, texts: Texts, tokenizer: Tokenizer, file: TokenFile, held_out: float
) -> Corpus:
    n_train = file.tokens.size - int(file.tokens.size * held_out)
    facts = ["everstep corpus 1", file.sha256, file.tokens.dtype.str, file.tokens.size, n_train]
    facts += [tokenizer.vocab_size, tokenizer.eos_id]
    return Corpus(
        name=name,
        tokens_train=file.tokens[:n_train],
        tokens_held_out=file.tokens[n_train:],
        digest=hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
        text_digest=texts.digest,
        tokenizer_digest=tokenizer.digest,
        documents=len(texts.documents),
        text_bytes=texts.size_bytes,
        skipped=texts.skipped,
        tokenizer=tokenizer,
    )


class _Cache:
    """The cache folder, as one corpus sees it."""

    def __init__(
        self,
        folder: Path,
        find: Callable[[], Sources],
        tokenizer: Tokenizer,
        progress: Progress | None,
    ) -> None:
        self.sources = find()
        self._find = find
        self._folder = folder
        self._tokenizer = tokenizer
        self._progress = progress
        self._tag = hashlib.sha256(self.sources.key.encode()).hexdigest()[:16]
        self._index_path = folder / f"index-1-{self._tag}"

    def load(self) -> tuple[Texts, TokenFile]:
        """The texts and their tokens, or DataError if they are not here."""
        known = decode_index(read_record(self._index_path))
        texts, _ = identify(self.sources, known, _Meter(self.sources, self._progress).advance)
        key = self._key(texts)
        tokens = open_token_file(self._folder / key.name, key)
        if tokens is None:
            raise DataError(
                f"the token cache '{self._folder}' has no intact tokens of {self.sources.name} as "
                "it is on this host; give all hosts the same text (for stdlib: the same Python), "
                "or open the corpus with build=True first"
            )
        return texts, tokens

    def load_or_build(self) -> tuple[Texts, TokenFile]:
        """The texts and their tokens, tokenized now if necessary."""
        with contextlib.suppress(OSError):  # writing will say what is wrong, if it comes to that
            self._folder.mkdir(parents=True, exist_ok=True)
        with self._only_one() as alone:
            if alone:
                self._remove_leftovers()
            try:
                return self._load_or_build(trust_index=True)
            except DocumentChangedError:
                # Changed this minute, or the file system deceived us: begin afresh.
                self.sources = self._find()
            try:
                return self._load_or_build(trust_index=False)
            except DocumentChangedError as error:
                raise DataError(
                    f"data.source: '{error.path}' changes while it is being read; start again when "
                    "nothing writes to it, or leave it out"
                ) from error

    def _load_or_build(self, trust_index: bool) -> tuple[Texts, TokenFile]:
        meter = _Meter(self.sources, self._progress)
        known = decode_index(read_record(self._index_path)) if trust_index else {}
        texts, index = identify(self.sources, known, meter.advance)
        if index != known:
            write_record(self._index_path, encode_index(index))
        key = self._key(texts)
        path = self._folder / key.name
        tokens = open_token_file(path, key)
        if tokens is None:
            self._build(path, key, texts, meter)
            tokens = open_token_file(path, key)
        if tokens is None:
            raise DataError(
                f"the token cache '{path}' does not read back as it was written: check the disk, "
                "or delete the folder to have it built again"
            )
        return texts, tokens

    def _build(self, path: Path, key: TokenFileKey, texts: Texts, meter: "_Meter") -> None:
        dtype = token_dtype(self._tokenizer.vocab_size)
        arrays = self._tokenizer.tokenize(read_pieces(texts.documents, meter.advance))
        try:
            write_token_file(path, key, dtype, arrays, self._tag)
        except OSError as error:
            raise DataError(
                f"cannot write the token cache in '{self._folder}': {error.strerror}; make room or "
                f"permission there (about {texts.size_bytes * dtype.itemsize:,} bytes at most)"
            ) from error
        meter.finish()

    def _key(self, texts: Texts) -> TokenFileKey:
        return TokenFileKey(texts.digest, self._tokenizer.digest)

    @contextlib.contextmanager
    def _only_one(self) -> Iterator[bool]:
        """Lets one process at a time work on these sources; a dead one's lock is free again.

        Yields False where locks do not work (some network file systems, read-only folders): all is
        correct without, only done more than once.
        """
        with contextlib.ExitStack() as stack:
            alone = False
            with contextlib.suppress(OSError):
                file = stack.enter_context((self._folder / f"lock-{self._tag}").open("wb"))
                fcntl.flock(file, fcntl.LOCK_EX)
                alone = True
            yield alone

    def _remove_leftovers(self) -> None:
        """Deletes what a killed process left; the lock says that nobody is writing it now."""
        for path in self._folder.glob(f"*.{self._tag}.*.tmp"):
            path.unlink(missing_ok=True)


class _Meter:
    """Counts bytes for a progress display."""

    def __init__(self, sources: Sources, progress: Progress | None) -> None:
        self._progress = progress
        self._total = 2 * sum(_size_bytes(file.path) for file in sources.files)
        self._done = 0

    def advance(self, size_bytes: int, was_read: bool) -> None:
        self._done = min(self._done + size_bytes, self._total)
        if was_read and self._progress is not None:
            self._progress(self._done, self._total)

    def finish(self) -> None:
        if self._progress is not None:
            self._progress(self._total, self._total)


def _size_bytes(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0
