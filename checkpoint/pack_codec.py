"""What parts and manifests say of packs, as JSON (pure)."""

import re
import reprlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from everstep.checkpoint.extents import Extent, check_extents
from everstep.checkpoint.grid_codec import decode_runs, encode_runs
from everstep.checkpoint.json_checks import natural, text
from everstep.checkpoint.layout import Integers
from everstep.checkpoint.pack import DATA_ALIGN_BYTES, PackRecord

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


def encode_pack(record: PackRecord) -> dict[str, Any]:
    """A record as JSON; extents without their sizes, which are those of the fragments."""
    members = asdict(record)
    del members["extents"]
    if record.extents is not None:
        del members["data_start"]
        members["kind"] = record.kind
        members["offsets"] = encode_runs([offset for offset, _ in record.extents])
    return members


def decode_pack(coded: Any, kind: Any, sizes: Callable[[], Integers]) -> PackRecord:
    """Inverse of ``encode_pack``; raises KeyError, TypeError or ValueError.

    Args:
        coded: what was decoded from JSON.
        kind: of the pack; what a part does not say, it is safetensors.
        sizes: for each cell of the pack, in order, bytes and bytes per item; asked of extents.
    """
    if kind not in ("safetensors", "raw_extents"):
        raise ValueError(f"pack kind {reprlib.repr(kind)} is not known to this version")
    if not _FILE_NAME.fullmatch(text(coded["file"])):
        raise ValueError(f"file name {reprlib.repr(coded['file'])}")
    is_raw = kind == "raw_extents"
    record = PackRecord(
        file=coded["file"],
        rank=natural(coded["rank"]),
        size_bytes=natural(coded["size_bytes"]),
        data_start=0 if is_raw else natural(coded["data_start"]),
        data_bytes=natural(coded["data_bytes"]),
        crc32c=natural(coded["crc32c"]),
        extents=_decode_extents(coded, sizes()) if is_raw else None,
    )
    if not is_raw and (record.data_start < 1 or record.data_start % DATA_ALIGN_BYTES):
        raise ValueError(f"its data starts at {record.data_start}")
    return record


def _decode_extents(coded: Any, sizes: Integers) -> tuple[Extent, ...]:
    n_bytes, item_bytes = sizes.T.tolist()
    file_bytes = natural(coded["size_bytes"])
    if not file_bytes:
        raise ValueError("its file of extents is empty")
    offsets = decode_runs(coded["offsets"], len(n_bytes), file_bytes)
    extents = tuple(zip(offsets, n_bytes, strict=True))
    check_extents(extents, item_bytes, file_bytes)
    return extents
