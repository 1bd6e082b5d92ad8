"""The zarr.json of arrays and groups, Zarr version 3 (pure).

zarr-specs.readthedocs.io/en/latest/v3/core; the names of types beyond the core are those of
TensorStore's zarr3 driver. Whatever a view leaves out must not be read as data: the fill value is
not-a-number wherever the type has one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from everstep.checkpoint.layout import ITEM_BYTES


@dataclass(frozen=True)
class ZarrType:
    """A data type and the fill value of its arrays."""

    name: str
    fill: Any


_NAN = "NaN"
CORE_TYPES = {
    "F64": ZarrType("float64", _NAN), "F32": ZarrType("float32", _NAN),
    "F16": ZarrType("float16", _NAN),
    "C128": ZarrType("complex128", [_NAN, _NAN]), "C64": ZarrType("complex64", [_NAN, _NAN]),
    "I64": ZarrType("int64", 0), "I32": ZarrType("int32", 0),
    "I16": ZarrType("int16", 0), "I8": ZarrType("int8", 0),
    "U64": ZarrType("uint64", 0), "U32": ZarrType("uint32", 0),
    "U16": ZarrType("uint16", 0), "U8": ZarrType("uint8", 0), "BOOL": ZarrType("bool", False),
}  # fmt: skip
"""Types that every reader of Zarr version 3 knows, by their names here."""
TENSORSTORE_TYPES = CORE_TYPES | {
    "BF16": ZarrType("bfloat16", _NAN),
    "F8_E4M3": ZarrType("float8_e4m3fn", _NAN),
    "F8_E5M2": ZarrType("float8_e5m2", _NAN),
    "F8_E4M3FNUZ": ZarrType("float8_e4m3fnuz", _NAN),
    "F8_E5M2FNUZ": ZarrType("float8_e5m2fnuz", _NAN),
    "F8_E8M0": ZarrType("float8_e8m0fnu", _NAN),
}
_NAN_BITS = {
    "BF16": 0x7FC0, "C32": 0x7E007E00, "F8_E4M3": 0x7F, "F8_E5M2": 0x7F,
    "F8_E4M3FNUZ": 0x80, "F8_E5M2FNUZ": 0x80, "F8_E8M0": 0xFF,
}  # fmt: skip


def zarr_type(dtype: str, known: Mapping[str, ZarrType]) -> ZarrType:
    """The type of a tensor's arrays; bits as unsigned integers where the reader has no such type.

    Args:
        dtype: a key of ``ITEM_BYTES``.
        known: the types that the reader knows.
    """
    bits = ZarrType(f"uint{8 * ITEM_BYTES[dtype]}", _NAN_BITS.get(dtype, 0))
    return known.get(dtype, bits)


def array_metadata(
    shape: Sequence[int],
    chunk_shape: Sequence[int],
    kind: ZarrType,
    attributes: Mapping[str, Any],
) -> dict[str, Any]:
    """The metadata of an array of raw little-endian chunks."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": kind.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": kind.fill,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "attributes": dict(attributes),
    }


def group_metadata(
    attributes: Mapping[str, Any], consolidated: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The metadata of a group, with that of everything below it where ``consolidated`` is given."""
    members = {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}
    if consolidated is None:
        return members
    inline = {"kind": "inline", "must_understand": False, "metadata": dict(consolidated)}
    return {**members, "consolidated_metadata": inline}


def encode_metadata(metadata: Mapping[str, Any]) -> bytes:
    """The bytes of a zarr.json."""
    return json.dumps(metadata, separators=(",", ":")).encode()


def node_name(name: str) -> str:
    """The name of a tensor in a Zarr group: the same, but for what Zarr forbids.

    A ``/`` would make another level, names must not consist of dots only, nor begin with ``__``,
    nor be ``zarr.json``: these characters and ``%`` become ``%`` and their code in hex. The empty
    name becomes ``%``.
    """
    safe = name.replace("%", "%25").replace("/", "%2F")
    if not safe.strip(".") or safe == "zarr.json":
        return safe.replace(".", "%2E") or "%"
    return f"%5F{safe[1:]}" if safe.startswith("__") else safe
