"""Encodings of the index against slow ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.checkpoint.views.ocdbt_format import common_prefix_bytes, keys_of, varints


def _varint(number: int) -> bytes:
    """One number, digit by digit."""
    out = bytearray()
    while number >= 128:
        out.append(number % 128 + 128)
        number //= 128
    return bytes([*out, number])


@given(st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 300)))
def test_varints(numbers: list[int]) -> None:
    assert varints(numbers) == b"".join(map(_varint, numbers))


@pytest.mark.parametrize("bits", range(0, 63, 7))
def test_varints_at_each_length(bits: int) -> None:
    numbers = [(1 << bits) - 1, 1 << bits, (1 << bits) + 1]
    assert varints(np.array(numbers)) == b"".join(map(_varint, numbers))


@given(st.lists(st.binary(max_size=4), min_size=1, unique=True))
def test_keys_can_be_put_together_again(keys: list[bytes]) -> None:
    keys.sort()
    columns = keys_of(keys)
    found, previous, at = [], b"", 0
    for shared, length in zip(
        [0, *columns.prefix_lengths.tolist()], columns.suffix_lengths.tolist(), strict=True
    ):
        previous = previous[:shared] + columns.suffixes[at : at + length]
        found.append(previous)
        at += length
    assert found == keys
    assert at == len(columns.suffixes)


def test_common_prefix() -> None:
    assert common_prefix_bytes(b"", b"a") == 0
    assert common_prefix_bytes(b"ab", b"abc") == 2
    assert common_prefix_bytes(b"abd", b"abc") == 2
