"""What the bytes of a tensor mean as numbers, for every dtype that a checkpoint holds (no torch).

numpy lacks bfloat16 and the float8 types: the first is the upper half of a float32, the others are
looked up in tables of 256 values. Sources: "FP8 Formats for Deep Learning" (Micikevicius et al.
2022) for E4M3 (only NaN: 0x7f, 0xff) and E5M2 (with infinities); "8-bit Numerical Formats for Deep
Neural Networks" (Noune et al. 2022) for FNUZ (one more in the bias, no infinities, NaN is 0x80);
the OCP Microscaling specification (2023) for E8M0 (a power of two, NaN is 0xff).
"""

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from everstep.checkpoint.direct_io import ByteArray

NUMPY_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "C64": "<c8", "C128": "<c16",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1", "BOOL": "<u1",
    "F4_X2": "<u1",
}  # fmt: skip
"""Those that NumPy has; it takes pairs of 4-bit floats as bytes."""


def numbers(dtype: str, data: ByteArray) -> npt.NDArray[Any]:
    """The elements of dense bytes, exactly: integers as they are, floats as a float of numpy's.

    A pair of 4-bit floats is its byte.

    Args:
        dtype: as in the manifest.
        data: whole elements, little-endian.
    """
    if dtype == "BF16":
        return (data.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "C32":
        with np.errstate(invalid="ignore"):  # signalling NaNs
            return data.view("<f2").astype(np.float32).view(np.complex64)
    if dtype.startswith("F8_"):
        return _float8(dtype)[data]
    return data.view(NUMPY_DTYPES[dtype])


def words(data: ByteArray, item_bytes: int) -> npt.NDArray[Any]:
    """The bits of each element as a row of unsigned numbers: one, or two for 16 bytes.

    Args:
        data: whole elements, little-endian; at least one.
        item_bytes: 1, 2, 4, 8 or 16.
    """
    return data.view(f"<u{min(item_bytes, 8)}").reshape(len(data) // item_bytes, -1)


@cache
def _float8(dtype: str) -> npt.NDArray[np.float32]:
    """The value of each byte; raises KeyError for a type that is not known."""
    byte = np.arange(256)
    values: npt.NDArray[Any]
    match dtype:
        case "F8_E4M3":
            values, nan = _small_floats(mantissa_bits=3, bias=7), byte & 127 == 127
        case "F8_E5M2":
            values, nan = _small_floats(mantissa_bits=2, bias=15), byte & 127 > 124
            values[[124, 252]] = np.inf, -np.inf
        case "F8_E4M3FNUZ":
            values, nan = _small_floats(mantissa_bits=3, bias=8), byte == 128
        case "F8_E5M2FNUZ":
            values, nan = _small_floats(mantissa_bits=2, bias=16), byte == 128
        case "F8_E8M0":
            values, nan = 2.0 ** (byte - 127.0), byte == 255
        case _:
            raise KeyError(dtype)
    return np.where(nan, np.nan, values).astype(np.float32)


def _small_floats(*, mantissa_bits: int, bias: int) -> npt.NDArray[np.float64]:
    """For each byte sign, exponent and mantissa as a number, as if there were no special values."""
    byte = np.arange(256)
    exponent, scale = (byte & 127) >> mantissa_bits, 2.0**mantissa_bits
    fraction = (byte & (1 << mantissa_bits) - 1) / scale
    normal = (1 + fraction) * 2.0 ** (exponent - bias)
    values = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), normal)
    return np.where(byte < 128, values, -values)
