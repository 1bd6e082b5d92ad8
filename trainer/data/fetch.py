"""Token files from elsewhere, fetched once into the cache, where they are mapped.

A file appears under its name only when all of it has come. Whether it is still what is there, the
file system is asked each time (see ``storage``); where that cannot tell, it is fetched again.
"""

import hashlib
from pathlib import Path
from typing import IO

from everstep.trainer.data.progress_meter import Meter
from everstep.trainer.data.sources import TOKEN_INDEX
from everstep.trainer.data.stamps import read_record, replacing, write_record
from everstep.trainer.data.storage import Storage, Storages
from everstep.trainer.data.token_folder import TOKENIZER_FILES, decode_folder
from everstep.trainer.errors import DataError

_CHUNK_BYTES = 2**20


def fetched_folder(
    storages: Storages, url: str, cache: Path, tag: str, build: bool, meter: Meter
) -> Path:
    """The local copy of a folder of tokens; shards that are here already are not fetched again.

    Its index comes last, as in any such folder, and decides what the shards must be.
    """
    folder = _folder_for(url, cache)
    if not build:
        return folder
    storage = storages.of(url)
    index_url = storage.join(url, TOKEN_INDEX)
    data = _read_small(storage, index_url)
    index = decode_folder(data, index_url)
    if index.tokenizer.kind != "bytes":
        for name in TOKENIZER_FILES:
            small = _read_small(storage, storage.join(url, name))
            _write(folder / name, small, tag)
    for shard in index.shards:
        path = folder / shard.file
        record = read_record(_record_path(path))
        same_size = path.exists() and path.stat().st_size == index.shard_bytes(shard)
        if same_size and record == shard.sha256:
            meter.advance(index.shard_bytes(shard), False)
            continue
        found = _fetch(storage, storage.join(url, shard.file), path, tag, meter)
        if found != shard.sha256:
            path.unlink()
            raise DataError(
                f"data.source: '{storage.join(url, shard.file)}' is not what its index says "
                "(another checksum): copy the folder there again"
            )
        write_record(_record_path(path), found)
    _write(folder / TOKEN_INDEX, data, tag)
    return folder


def fetched_file(
    storages: Storages, url: str, cache: Path, tag: str, build: bool, meter: Meter
) -> Path:
    """The local copy of one file of tokens."""
    name = url.partition("::")[0].partition("?")[0].rstrip("/").rpartition("/")[2]
    path = _folder_for(url, cache) / name
    if not build:
        if not path.exists():
            raise DataError(
                f"the cache '{cache}' has no copy of '{url}' on this host; open the corpus with "
                "build=True first"
            )
        return path
    storage = storages.of(url)
    try:
        stamp, trusted = storage.stamp(url)
    except OSError as error:
        raise _unreadable(url, error) from error
    if trusted and path.exists() and read_record(_record_path(path)) == stamp:
        meter.advance(path.stat().st_size, False)
        return path
    _record_path(path).unlink(missing_ok=True)
    _fetch(storage, url, path, tag, meter)
    if stamp[0] not in (None, size_bytes := path.stat().st_size):
        path.unlink()
        raise DataError(
            f"data.source: '{url}' has {stamp[0]:,} bytes and {size_bytes:,} came: it changes, or "
            "the connection was cut; start again"
        )
    if trusted:
        write_record(_record_path(path), stamp)
    return path


def _folder_for(url: str, cache: Path) -> Path:
    return cache / "fetched" / hashlib.sha256(url.encode()).hexdigest()[:16]


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.fetched")


def _read_small(storage: Storage, url: str) -> bytes:
    try:
        with storage.open(url) as file:
            return file.read()
    except OSError as error:
        raise _unreadable(url, error) from error


def _write(path: Path, data: bytes, tag: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, tag) as file:
            file.write(data)
    except OSError as error:
        raise _no_room(path, error) from error


def _fetch(storage: Storage, url: str, path: Path, tag: str, meter: Meter) -> str:
    """Copies a file, and returns the SHA-256 of what has come."""
    hasher = hashlib.sha256()
    try:
        source = storage.open(url)
    except OSError as error:
        raise _unreadable(url, error) from error
    with source:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, tag) as file:
                while chunk := _next_chunk(source, url):
                    hasher.update(chunk)
                    file.write(chunk)
                    meter.advance(len(chunk), True)
        except OSError as error:
            raise _no_room(path, error) from error
    return hasher.hexdigest()


def _next_chunk(source: IO[bytes], url: str) -> bytes:
    try:
        return source.read(_CHUNK_BYTES)
    except OSError as error:
        raise _unreadable(url, error) from error


def _unreadable(url: str, error: OSError) -> DataError:
    return DataError(
        f"data.source: cannot read '{url}': {error.strerror or error}; check the URL and "
        "storage_options"
    )


def _no_room(path: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot write the copy '{path}': {error.strerror}; make room or permission there"
    )
