"""Floating-point tensors from one dtype to another, in NumPy, a block at a time.

NumPy has no bfloat16: its bits are the upper half of a float32. Values are rounded to the nearest,
ties to even, doubles on their way to bfloat16 through float32, as torch does it; what is too large
becomes infinite, NaN stays NaN.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from everstep.checkpoint.errors import CheckpointError
from everstep.checkpoint.numbers import NUMPY_DTYPES

FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes that can be cast to each other."""


def can_cast(source: str, target: str) -> bool:
    """Whether values of one dtype can be turned into another here."""
    return source in FLOATS and target in FLOATS


def check_float(dtype: str) -> None:
    """Raises CheckpointError for what is no dtype to convert to."""
    if dtype not in FLOATS:
        raise CheckpointError(f"dtype: got {dtype!r}, expected one of {', '.join(FLOATS)}")


def encode(values: NDArray[Any], dtype: str) -> NDArray[np.uint8]:
    """Inverse of ``numbers``, rounding; floating-point numbers to dense bytes."""
    with np.errstate(over="ignore", invalid="ignore"):  # too large, signalling NaN
        if dtype != "BF16":
            return np.ascontiguousarray(values, NUMPY_DTYPES[dtype]).view(np.uint8)
        single = np.ascontiguousarray(values, "<f4")
    bits = single.view("<u4")
    rounded = bits >> 16
    rounded &= 1  # a tie goes to the even neighbour
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    rounded[np.isnan(single)] = 0x7FC0
    data: NDArray[np.uint8] = rounded.astype("<u2").view(np.uint8)
    return data
