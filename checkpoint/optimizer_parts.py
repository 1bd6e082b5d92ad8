"""The saved values of one optimizer whose parameters are spread over ranks (no torch).

A rank that holds some of the parameters, such as those of its pipeline stages, has an optimizer
over these; a checkpoint holds them as one.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from everstep.checkpoint.errors import LayoutError
from everstep.checkpoint.plain_json import Json


def digest_values(values: Json) -> str:
    """Equal for ranks that have the same ``torch_optimizer.optimizer_values`` to tell."""
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=16).hexdigest()


def merge_values(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The values of the whole optimizer, from ranks in order, each with those that it holds.

    Where ranks tell of the same thing, the first one's word counts.

    Raises:
        LayoutError: ranks have different numbers of parameter groups.
    """
    counts = {len(part["groups"]) for part in parts}
    if len(counts) > 1:
        raise LayoutError(
            f"ranks have optimizers with {sorted(counts)} parameter groups: give all of them the "
            "same ones, with the parameters that each rank holds"
        )
    groups = [
        same[0] | {"params": list(dict.fromkeys(n for group in same for n in group["params"]))}
        for same in zip(*(part["groups"] for part in parts), strict=True)
    ]
    values: dict[str, Any] = {}
    for part in reversed(parts):
        values |= part["values"]
    return {"groups": groups, "values": values}
