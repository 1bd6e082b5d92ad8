"""Bytes as numbers: the types that numpy lacks mean what torch takes them for."""

import numpy as np
import pytest
import torch

from everstep.checkpoint.layout import ITEM_BYTES
from everstep.checkpoint.numbers import numbers, words
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


@pytest.mark.parametrize("item_bytes", [1, 2, 4, 8])
def test_words_are_the_bits_of_each_element(item_bytes: int) -> None:
    data = np.arange(48, dtype=np.uint8)
    expected = [
        [int.from_bytes(data[at : at + item_bytes].tobytes(), "little")]
        for at in range(0, len(data), item_bytes)
    ]
    assert words(data, item_bytes).tolist() == expected


def test_sixteen_bytes_are_two_words_low_one_first() -> None:
    data = np.zeros(32, np.uint8)
    data[[0, 8, 31]] = 1, 2, 128
    assert words(data, 16).tolist() == [[1, 2], [0, 2**63]]
