"""Casts are torch's, bit for bit."""

import numpy as np
import pytest
import torch

from everstep.checkpoint.convert.cast import FLOATS, can_cast, encode
from everstep.checkpoint.numbers import numbers
from everstep.checkpoint.torch_layout import DTYPES


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_every_cast_is_that_of_torch(source: str, target: str) -> None:
    random = np.random.default_rng(0)
    width = {"F64": 8, "F32": 4}.get(source, 2)
    data = random.integers(0, 256, 4000 * width, dtype=np.uint8)
    values = torch.from_numpy(data.copy()).view(DTYPES[source])
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 65504.0, 65520.0, 3.4e38, -0.0, 2**-130, 1e-40])
    values = torch.cat([values, ties.to(DTYPES[source])])
    found = encode(numbers(source, values.view(torch.uint8).numpy()), target)
    expected = values.to(DTYPES[target])
    result = torch.from_numpy(found.copy()).view(DTYPES[target])
    nan = expected.isnan()
    assert torch.equal(result.isnan(), nan)
    same = result.view(torch.uint8).view(len(nan), -1) == expected.view(torch.uint8).view(
        len(nan), -1
    )
    assert bool(same[~nan].all())


def test_only_floating_point_numbers() -> None:
    assert can_cast("F32", "BF16")
    assert not can_cast("I64", "F32")
    assert not can_cast("F32", "F8_E4M3")
