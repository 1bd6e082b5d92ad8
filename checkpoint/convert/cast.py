"""Floating-point tensors from one dtype to another, in NumPy, a block at a time.

NumPy has no bfloat16: its bits are the upper half of a float32. Values are rounded to the nearest,
ties to even, doubles on their way to bfloat16 through float32, as torch does it; what is too large
becomes infinite, NaN stays NaN.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_NUMPY: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
}
FLOATS = (*_NUMPY, "BF16")
"""The dtypes that can be cast to each other."""


def can_cast(source: str, target: str) -> bool:
    """Whether values of one dtype can be turned into another here."""
    return source in FLOATS and target in FLOATS


def decode(data: NDArray[np.uint8], dtype: str) -> NDArray[Any]:
    """Dense bytes as numbers that NumPy can calculate with; BF16 becomes float32."""
    if dtype != "BF16":
        return data.view(_NUMPY[dtype])
    return (data.view("<u2").astype("<u4") << 16).view("<f4")


def encode(values: NDArray[Any], dtype: str) -> NDArray[np.uint8]:
    """Inverse of ``decode``, rounding; numbers to dense bytes."""
    with np.errstate(over="ignore", invalid="ignore"):  # too large, signalling NaN
        if dtype != "BF16":
            return np.ascontiguousarray(values, _NUMPY[dtype]).view(np.uint8)
        single = np.ascontiguousarray(values, "<f4")
    bits = single.view("<u4")
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype("<u4")) >> 16).astype("<u2")
    rounded[np.isnan(single)] = 0x7FC0
    data: NDArray[np.uint8] = rounded.view(np.uint8)
    return data


def cast(data: NDArray[np.uint8], source: str, target: str) -> NDArray[np.uint8]:
    """Dense bytes of one dtype as dense bytes of another."""
    return data if source == target else encode(decode(data, source), target)
