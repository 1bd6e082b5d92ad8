"""A folder of tokens made by ``everstep data tokenize``: its index, its shards, its tokenizer.

The index, ``everstep_tokens.json``, is written last: a folder without one is not finished and is
never read. It is one JSON object whose ``checksum`` is the SHA-256 of the object without it, keys
sorted and without spaces. A shard is nothing but tokens, little-endian unsigned integers; a
document may go on in the next shard. ``tokenizer.json`` is the tokenizer that made them, with a
``tokenizer_config.json`` that names its end of document; the tokenizer 'bytes' needs neither.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, ValidationError

from everstep.trainer.config import Section
from everstep.trainer.data.pieces import Count
from everstep.trainer.data.problems import unreadable
from everstep.trainer.data.sources import TOKEN_INDEX
from everstep.trainer.data.storage import Storages
from everstep.trainer.data.token_row import TokenArray
from everstep.trainer.data.tokenizer import BYTES, BytesTokenizer, HfTokenizer, Tokenizer
from everstep.trainer.errors import DataError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
FORMAT = "everstep tokens 1"
_CHUNK_BYTES = 2**22

Whole = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Shard(Section):
    """One file of tokens."""

    file: Annotated[str, Field(pattern=r"^tokens-[0-9]+-[0-9]+\.bin$")]
    """Its name in the folder."""
    tokens: Whole
    sha256: Sha256
    """Of its bytes."""


class TokenizerFacts(Section):
    """The tokenizer that made the tokens."""

    kind: Literal["bytes", "tokenizer.json"]
    digest: str
    """Of everything that decides which tokens a text becomes."""
    vocab_size: Annotated[int, Field(ge=1)]
    eos_id: Whole


class Recipe(Section):
    """What the folder was asked to hold."""

    sources: tuple[str, ...]
    """As they were named."""
    format: str
    text_key: str
    on_bad_rows: str
    shard_tokens: Annotated[int, Field(ge=1)]
    """Most tokens in a shard."""


class TokenFolder(Section):
    """The index of a folder of tokens."""

    format: Literal["everstep tokens 1"] = "everstep tokens 1"
    dtype: Literal["|u1", "<u2", "<u4"]
    documents: Whole
    text_bytes: Whole
    """UTF-8 bytes of all documents."""
    bad_rows: Whole
    """Rows that were skipped."""
    tokenizer: TokenizerFacts
    recipe: Recipe
    shards: tuple[Shard, ...]

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def digest(self) -> str:
        """Hex digest of all tokens, in order."""
        facts = [FORMAT, self.dtype, [[shard.tokens, shard.sha256] for shard in self.shards]]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def shard_bytes(self, shard: Shard) -> int:
        """Size of the file of ``shard``."""
        return shard.tokens * np.dtype(self.dtype).itemsize


def encode_folder(folder: TokenFolder) -> bytes:
    """The contents of the index file; the same for equal folders."""
    values = folder.model_dump(mode="json")
    return (json.dumps({**values, "checksum": _checksum(values)}, indent=1) + "\n").encode()


def decode_folder(data: bytes, path: str) -> TokenFolder:
    """The inverse of ``encode_folder``; raises DataError for whatever it has not written."""
    try:
        values = json.loads(data)
        intact = values.pop("checksum") == _checksum(values)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise DataError(
            f"the index '{path}' is damaged: copy the folder again, or make it again with "
            "everstep data tokenize"
        )
    try:
        return TokenFolder.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(
            f"the index '{path}' is not of the format {FORMAT!r} that this version reads ({where}: "
            f"{first['msg']}): make the folder again with everstep data tokenize"
        ) from error


def read_index(storages: Storages, path: str) -> TokenFolder:
    """The index of a folder anywhere. Raises DataError."""
    storage = storages.of(path)
    index_path = storage.join(path, TOKEN_INDEX)
    try:
        with storage.open(index_path) as file:
            return decode_folder(file.read(), index_path)
    except OSError as error:
        raise unreadable(index_path, error) from error


def read_folder(folder: Path) -> TokenFolder:
    """The index of a local folder. Raises DataError, also for shards of a wrong size."""
    path = folder / TOKEN_INDEX
    try:
        index = decode_folder(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise DataError(
            f"'{folder}' holds no finished tokens (it has no {TOKEN_INDEX}): name a folder made by "
            "everstep data tokenize, or run that command again to its end"
        ) from error
    except OSError as error:
        raise unreadable(str(path), error) from error
    for shard in index.shards:
        file = folder / shard.file
        size_bytes = file.stat().st_size if file.exists() else None
        if size_bytes != index.shard_bytes(shard):
            found = "is missing" if size_bytes is None else f"has {size_bytes:,} bytes"
            raise DataError(
                f"the shard '{file}' {found}, and its index says {index.shard_bytes(shard):,} "
                "bytes: copy the folder again, or make it again with everstep data tokenize"
            )
    return index


def open_shards(folder: Path, index: TokenFolder) -> list[TokenArray]:
    """The tokens of each shard, mapped read-only, unchecked."""
    return [map_tokens(folder / s.file, np.dtype(index.dtype), s.tokens) for s in index.shards]


def shard_is_intact(folder: Path, shard: Shard) -> bool:
    """Whether the shard is there and has its checksum; reads all of it."""
    try:
        return sha256_of_file(folder / shard.file, lambda size_bytes: None) == shard.sha256
    except OSError:
        return False


def sha256_of_file(path: Path, count: Count) -> str:
    """Hex digest of a local file. Raises OSError, and whatever ``count`` raises to stop it."""
    hasher = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            hasher.update(chunk)
            count(len(chunk))
    return hasher.hexdigest()


def map_tokens(path: Path, dtype: np.dtype[np.unsignedinteger], count: int) -> TokenArray:
    """A file of tokens mapped read-only; an empty file cannot be mapped, and needs not."""
    if not count:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r", shape=(count,)))


def tokenizer_of(folder: Path, index: TokenFolder) -> Tokenizer:
    """The tokenizer that made the tokens. Raises DataError if its copy is not what it was."""
    tokenizer: Tokenizer
    if index.tokenizer.kind == BYTES:
        tokenizer = BytesTokenizer()
    else:
        tokenizer = HfTokenizer(folder / TOKENIZER_FILES[0])
    if tokenizer.digest != index.tokenizer.digest:
        raise DataError(
            f"the tokenizer in '{folder}' is not the one that made its tokens: put the original "
            "back, or make the folder again with everstep data tokenize"
        )
    return tokenizer


def _checksum(values: object) -> str:
    body = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(body.encode()).hexdigest()
