"""What the bytes of a tensor mean as numbers, for every dtype that a checkpoint holds (no torch).

numpy lacks bfloat16 and the float8 types: the first is the upper half of a float32, the others are
looked up in a table of 256 values. E4M3 and E5M2 are those of "FP8 Formats for Deep Learning"
(Micikevicius et al. 2022): E5M2 has infinities, E4M3 has only NaN (0x7f, 0xff).
"""

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from everstep.checkpoint.direct_io import ByteArray

_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "C64": "<c8",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1", "BOOL": "<u1",
}  # fmt: skip


def numbers(dtype: str, data: ByteArray) -> npt.NDArray[Any]:
    """The elements of dense bytes, exactly: integers as they are, floats as a float of numpy's.

    Args:
        dtype: as in the manifest.
        data: whole elements, little-endian.
    """
    match dtype:
        case "BF16":
            return (data.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
        case "F8_E4M3":
            return _e4m3()[data]
        case "F8_E5M2":
            return _e5m2()[data]
    return data.view(_DTYPES[dtype])


@cache
def _e5m2() -> npt.NDArray[np.float32]:
    """By byte; E5M2 is the upper half of a float16."""
    values = (np.arange(256, dtype=np.uint16) << np.uint16(8)).view(np.float16)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return values.astype(np.float32)


@cache
def _e4m3() -> npt.NDArray[np.float32]:
    """By byte; exponent bias 7, no infinities."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    values = np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    values[byte & 127 == 127] = np.nan
    return np.where(byte < 128, values, -values).astype(np.float32)
