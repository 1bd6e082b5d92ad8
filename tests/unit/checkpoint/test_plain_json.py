"""Plain values survive the way through JSON exactly."""

import json
import math
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import pytest

from everstep.checkpoint.errors import StateError
from everstep.checkpoint.plain_json import from_json, to_json


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -(2**70),
        0.1,
        5e-324,
        math.inf,
        -math.inf,
        "grün",
        [],
        (),
        {},
        (1, [2, (3,)]),
        {"a": {"b": (0.9, 0.95)}},
        {30: 1, 80: 2},
        {(1, "x"): None, True: False},
        {"$tuple": [1], "$": 2},
        {"milestones": {2: 1}, "base_lrs": [1e-3], "lambdas": [None]},
    ],
    ids=repr,
)
def test_there_and_back(value: Any) -> None:
    text = json.dumps(to_json(value, "x"), allow_nan=False)
    back = from_json(json.loads(text))
    assert back == value
    assert repr(back) == repr(value)


def test_not_a_number() -> None:
    assert math.isnan(from_json(to_json(math.nan, "x")))


def test_kinds_of_numbers_and_mappings() -> None:
    value = {"lr": np.float64(0.1), "seen": Counter({3: 1}), "order": OrderedDict(b=1, a=2)}
    back = from_json(json.loads(json.dumps(to_json(value, "x"))))
    assert back == {"lr": 0.1, "seen": {3: 1}, "order": {"b": 1, "a": 2}}
    assert list(back["order"]) == ["b", "a"]


@pytest.mark.parametrize("value", [{1, 2}, b"x", object(), np.float32(1), np.zeros(2), 1j])
def test_what_is_not_plain_is_named(value: object) -> None:
    with pytest.raises(StateError, match=rf"scheduler\.deep\[1\] is a {type(value).__name__}"):
        to_json({"deep": [0, value]}, "scheduler")


@pytest.mark.parametrize(
    "coded",
    [
        {"$float": "1"},
        {"$float": 1},
        {"$tuple": 3},
        {"$pairs": [[1]]},
        {"$pairs": {}},
        {"$other": 1},
        {"$tuple": [], "a": 1},
    ],
    ids=str,
)
def test_tags_that_nobody_writes(coded: object) -> None:
    with pytest.raises(ValueError):
        from_json({"nested": [coded]})
