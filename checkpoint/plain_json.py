"""Plain Python values as JSON and back, exactly (pure).

JSON alone turns tuples into lists and the keys of mappings into text, and has no infinities: a
scheduler would come back subtly changed. These travel as objects with one tagged member::

    (1, 2)          {"$tuple": [1, 2]}
    {30: 1}         {"$pairs": [[30, 1]]}
    inf, -inf, nan  {"$float": "inf"}
    a tensor        {"$tensor": "object.ema.average"}: the name under which it is stored
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from everstep.checkpoint.errors import StateError

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


def to_json(value: Any, where: str, other: Callable[[Any, str], Json] | None = None) -> Json:
    """The JSON form of None, numbers, text, lists, tuples and mappings, however nested.

    Args:
        value: what to encode.
        where: its name, for the error.
        other: what makes the JSON form of values of other types, given the value and its name.

    Raises:
        StateError: something in it is of another type, and there is no ``other``.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, list):
        return [to_json(v, f"{where}[{i}]", other) for i, v in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": to_json(list(value), where, other)}
    if isinstance(value, Mapping):
        if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return {k: to_json(v, f"{where}.{k}", other) for k, v in value.items()}
        return {
            "$pairs": [
                [to_json(k, where), to_json(v, f"{where}.{k}", other)] for k, v in value.items()
            ]
        }
    if other is not None:
        return other(value, where)
    raise not_plain(value, where)


def not_plain(value: Any, where: str) -> StateError:
    """The error of a value that has no JSON form."""
    return StateError(
        f"{where} is a {type(value).__name__}: a checkpoint keeps numbers, text, lists, tuples and "
        "mappings; tensors only in the state_dict of an object"
    )


def from_json(value: Any, tensor: Callable[[str], Any] | None = None) -> Any:
    """Inverse of ``to_json``; raises ValueError where a tag is not what it writes.

    Args:
        value: what was decoded from JSON.
        tensor: gives the tensor of a name, where ``{"$tensor": name}`` stands for one.
    """
    if isinstance(value, list):
        return [from_json(v, tensor) for v in value]
    if not isinstance(value, dict):
        return value
    if not any(k.startswith("$") for k in value):
        return {k: from_json(v, tensor) for k, v in value.items()}
    if len(value) == 1:
        match next(iter(value.items())):
            case "$float", "inf" | "-inf" | "nan" as text:
                return float(text)
            case "$tuple", [*items]:
                return tuple(from_json(item, tensor) for item in items)
            case "$tensor", str(name) if tensor is not None:
                return tensor(name)
            case "$pairs", [*pairs] if all(isinstance(p, list) and len(p) == 2 for p in pairs):
                return {from_json(k): from_json(v, tensor) for k, v in pairs}
    raise ValueError(f"members {sorted(value)[:4]} are no value that is known")
