"""Text to token ids and back: raw bytes, or any Hugging Face ``tokenizer.json``."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from everstep.trainer.data.pieces import Piece
from everstep.trainer.data.token_row import TokenArray
from everstep.trainer.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HfLibraryTokenizer

BYTES = "bytes"
"""The tokenizer that needs no file: one token per byte of UTF-8, and one that ends a document."""

_BATCH_BYTES = 16 * 2**20
"""Text given to the HF library at once: enough for every core, little enough to hold in memory."""

_USUAL_EOS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|end▁of▁sentence|>",
    "[EOS]",
    "<EOS>",
)


class Tokenizer(Protocol):
    """What a corpus needs of a tokenizer."""

    @property
    def digest(self) -> str:
        """Hex digest of everything that decides which tokens a text becomes."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        ...

    @property
    def eos_id(self) -> int:
        """The token that follows every document."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without an end of document."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; special tokens and ids that stand for nothing are left out."""
        ...

    def tokenize(self, pieces: Iterable[Piece]) -> Iterator[TokenArray]:
        """Tokens of all pieces in order, ``eos_id`` after the last one of each document."""
        ...


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that ``data.tokenizer`` names. Raises DataError."""
    return BytesTokenizer() if name == BYTES else HfTokenizer(Path(name).expanduser())


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds every token id."""
    return np.dtype(np.min_scalar_type(vocab_size - 1))


class BytesTokenizer:
    """Tokens 0 to 255 are the bytes of the UTF-8 text, 256 ends a document."""

    digest = hashlib.sha256(b"everstep bytes tokenizer 1").hexdigest()
    vocab_size = 257
    eos_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < self.eos_id).decode(errors="replace")

    def tokenize(self, pieces: Iterable[Piece]) -> Iterator[TokenArray]:
        dtype = token_dtype(self.vocab_size)
        for piece in pieces:
            tokens = np.empty(len(piece.text) + piece.ends_document, dtype=dtype)
            tokens[: len(piece.text)] = np.frombuffer(piece.text, dtype=np.uint8)
            if piece.ends_document:
                tokens[-1] = self.eos_id
            yield tokens


class HfTokenizer:
    """A ``tokenizer.json``, run by the ``tokenizers`` package on all cores.

    No special tokens are added but the end of document. As usual in the HF world, special tokens
    that are spelled out in the text are recognised. Truncation and padding that the file may ask
    for are switched off.

    The file does not say which token ends a document. It is taken from ``eos_token`` in
    ``tokenizer_config.json`` or ``special_tokens_map.json`` beside it, else it is the only one of
    the usual names (``<|endoftext|>``, ``</s>``, ...) that the vocabulary has.
    """

    def __init__(self, path: Path) -> None:
        self._library_tokenizer, contents = _load_library_tokenizer(path)
        self._library_tokenizer.no_truncation()
        self._library_tokenizer.no_padding()
        vocabulary = self._library_tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"data.tokenizer: {path} has an empty vocabulary")
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_token = _find_eos(path, vocabulary)
        self.eos_id = vocabulary[self.eos_token]
        identity = hashlib.sha256(contents).hexdigest() + f" eos={self.eos_id}"
        self.digest = hashlib.sha256(identity.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(self._library_tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        known = [int(i) for i in ids if i < self.vocab_size]
        return str(self._library_tokenizer.decode(known, skip_special_tokens=True))

    def tokenize(self, pieces: Iterable[Piece]) -> Iterator[TokenArray]:
        dtype = token_dtype(self.vocab_size)
        for batch in _batched(pieces, _BATCH_BYTES):
            # Only text of a file that has just changed needs replacing, and that is thrown away.
            texts = [piece.text.decode(errors="replace") for piece in batch]
            encodings = self._library_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            for piece, encoding in zip(batch, encodings, strict=True):
                ids = [*encoding.ids, self.eos_id] if piece.ends_document else encoding.ids
                yield np.array(ids, dtype=dtype)


def _batched(pieces: Iterable[Piece], most_bytes: int) -> Iterator[list[Piece]]:
    """Groups of pieces, each closed once it reaches ``most_bytes``."""
    batch: list[Piece] = []
    size_bytes = 0
    for piece in pieces:
        batch.append(piece)
        size_bytes += len(piece.text)
        if size_bytes >= most_bytes:
            yield batch
            batch, size_bytes = [], 0
    if batch:
        yield batch


def _load_library_tokenizer(path: Path) -> tuple["HfLibraryTokenizer", bytes]:
    """The library's object and the bytes of the file."""
    if path.is_dir():
        raise DataError(
            f"data.tokenizer: '{path}' is a folder; give the file in it, "
            f"'{path / 'tokenizer.json'}'"
        )
    try:
        contents = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            f"data.tokenizer: there is no file '{path}' (looked in {Path.cwd()}); it is 'bytes' or "
            "the path of a Hugging Face tokenizer.json"
        ) from error
    except OSError as error:
        raise DataError(f"data.tokenizer: cannot read '{path}': {error.strerror}") from error
    try:
        from tokenizers import Tokenizer as LibraryTokenizer
    except ImportError as error:
        raise DataError(
            f"data.tokenizer='{path}' needs the package 'tokenizers': install it with "
            "pip install 'everstep[hf]', or use data.tokenizer=bytes"
        ) from error
    try:
        return LibraryTokenizer.from_buffer(contents), contents
    except Exception as error:  # the library raises plain Exception
        raise DataError(
            f"data.tokenizer: '{path}' is not a tokenizer.json of the tokenizers library ({error})"
        ) from error


def _find_eos(path: Path, vocabulary: dict[str, int]) -> str:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _declared_eos(path.with_name(name))
        if token is None:
            continue
        if token not in vocabulary:
            raise DataError(
                f"data.tokenizer: {path.with_name(name)} names {token!r} as eos_token, which the "
                f"vocabulary of {path} does not have; correct that name"
            )
        return token
    present = [token for token in _USUAL_EOS if token in vocabulary]
    if len(present) == 1:
        return present[0]
    found = f"several usual ones ({', '.join(present)})" if present else "none of the usual ones"
    raise DataError(
        f"data.tokenizer: cannot tell which token of {path} ends a document: it has {found}; put a "
        f'tokenizer_config.json with {{"eos_token": "..."}} beside it'
    )


def _declared_eos(path: Path) -> str | None:
    """``eos_token`` of one of the JSON files that accompany tokenizers, if it is there."""
    try:
        declared = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"data.tokenizer: cannot read {path}: {error}") from error
    token = declared.get("eos_token") if isinstance(declared, dict) else None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
