"""Tokens of one source of text, from the cache where it has them, else made now."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from everstep.trainer.data.cache_lock import working_alone
from everstep.trainer.data.documents import (
    DocumentChangedError,
    Texts,
    decode_index,
    encode_index,
    identify,
    read_pieces,
)
from everstep.trainer.data.pieces import Tally
from everstep.trainer.data.problems import changing
from everstep.trainer.data.progress_meter import Meter
from everstep.trainer.data.sources import Sources
from everstep.trainer.data.stamps import read_record, write_record
from everstep.trainer.data.token_file import (
    TokenFile,
    TokenFileKey,
    open_token_file,
    write_token_file,
)
from everstep.trainer.data.tokenizer import Tokenizer, token_dtype
from everstep.trainer.errors import DataError


class TextCache:
    """The cache folder, as one source sees it.

    Args:
        folder: Of the cache; shared by all sources.
        sources: As ``find`` found them.
        find: Looks for the files of the source again.
        tokenizer: Makes the tokens.
        meter: Counts what is read.
    """

    def __init__(
        self,
        folder: Path,
        sources: Sources,
        find: Callable[[], Sources],
        tokenizer: Tokenizer,
        meter: Meter,
    ) -> None:
        self._sources = sources
        self._find = find
        self._folder = folder
        self._tokenizer = tokenizer
        self._meter = meter
        self._index_path = folder / f"index-2-{sources.tag}"

    def load(self) -> tuple[Texts, TokenFile]:
        """The texts and their tokens, or DataError if they are not here."""
        known = decode_index(read_record(self._index_path))
        texts, _ = identify(self._sources, known, self._meter.advance, recheck=False)
        key = self._key(texts)
        tokens = open_token_file(self._folder / key.name, key)
        if tokens is None:
            raise DataError(
                f"the token cache '{self._folder}' has no intact tokens of {self._sources.name} as "
                "it is on this host; give all hosts the same text (for stdlib: the same Python), "
                "or open the corpus with build=True first"
            )
        return texts, tokens

    def load_or_build(self) -> tuple[Texts, TokenFile]:
        """The texts and their tokens, tokenized now if necessary."""
        with working_alone(self._folder, self._sources.tag):
            try:
                return self._load_or_build(trust_index=True)
            except DocumentChangedError:
                # Changed this minute, or the file system deceived us: begin afresh.
                self._sources = self._find()
            try:
                return self._load_or_build(trust_index=False)
            except DocumentChangedError as error:
                raise changing(error.path) from error

    def _load_or_build(self, trust_index: bool) -> tuple[Texts, TokenFile]:
        known = decode_index(read_record(self._index_path)) if trust_index else {}
        texts, index = identify(self._sources, known, self._meter.advance)
        if index != known:
            write_record(self._index_path, encode_index(index))
        key = self._key(texts)
        path = self._folder / key.name
        tokens = open_token_file(path, key)
        if tokens is None:
            self._build(path, key, texts)
            tokens = open_token_file(path, key)
        else:
            self._meter.advance(texts.size_bytes, False)
        if tokens is None:
            raise DataError(
                f"the token cache '{path}' does not read back as it was written: check the disk, "
                "or delete the folder to have it built again"
            )
        return texts, tokens

    def _build(self, path: Path, key: TokenFileKey, texts: Texts) -> None:
        dtype = token_dtype(self._tokenizer.vocab_size)
        tally = Tally()
        pieces = read_pieces(self._sources, texts.documents, self._meter.advance, tally)
        has_rows = any(document.format != "text" for document in texts.documents)
        try:
            write_token_file(
                path,
                key,
                dtype,
                self._tokenizer.tokenize(pieces),
                self._sources.tag,
                facts=lambda: asdict(tally) if has_rows else {},
            )
        except OSError as error:
            raise DataError(
                f"cannot write the token cache in '{self._folder}': {error.strerror}; make room or "
                f"permission there (about {texts.size_bytes * dtype.itemsize:,} bytes at most)"
            ) from error

    def _key(self, texts: Texts) -> TokenFileKey:
        return TokenFileKey(texts.digest, self._tokenizer.digest)
