"""Bytes as numbers: the types that numpy lacks mean what torch takes them for."""

import numpy as np
import pytest
import torch

from everstep.checkpoint.layout import ITEM_BYTES
from everstep.checkpoint.numbers import numbers
from everstep.checkpoint.torch_layout import DTYPES

PAIRS = "F4_X2"


@pytest.mark.parametrize("dtype", [dtype for dtype in ITEM_BYTES if dtype != PAIRS])
def test_every_dtype_is_what_torch_takes_it_for(dtype: str) -> None:
    if dtype == "BOOL":
        data = np.array([0, 1], np.uint8)
    elif ITEM_BYTES[dtype] == 1:
        data = np.arange(256, dtype=np.uint8)
    elif ITEM_BYTES[dtype] == 2:
        data = np.arange(2**16, dtype="<u2").view(np.uint8)
    else:
        data = np.random.default_rng(1).integers(0, 256, 2**16, dtype=np.uint8)
    found = numbers(dtype, data)
    expected = torch.from_numpy(data).view(DTYPES[dtype])
    if expected.dtype.is_floating_point:
        expected = expected.to(torch.float64)
        with np.errstate(invalid="ignore"):  # signalling NaNs
            found = found.astype(np.float64)
    elif expected.is_complex():
        expected = expected.to(torch.complex128)
        with np.errstate(invalid="ignore"):
            found = found.astype(np.complex128)
    np.testing.assert_array_equal(found, expected.numpy())


def test_pairs_are_their_bytes() -> None:
    assert numbers(PAIRS, np.array([0, 7, 255], np.uint8)).tolist() == [0, 7, 255]
