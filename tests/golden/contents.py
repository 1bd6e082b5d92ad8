"""What the golden checkpoints hold, by formula; nothing of it may ever change.

``v1`` was written by ``make.py``: step 1 of generation 1, a step 3 that was abandoned when
generation 2 went on from step 1, and step 2 of generation 2, the newest, in three packs.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from everstep.checkpoint.layout import Box

BITS: dict[str, str] = {
    "F64": "<u8", "F32": "<u4", "F16": "<u2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1",
    "C64": "<u8", "I64": "<u8", "I32": "<u4", "I16": "<u2", "I8": "u1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "u1",
    "F8_E4M3FNUZ": "u1", "F8_E5M2FNUZ": "u1", "F8_E8M0": "u1", "F4_X2": "u1",
    "C32": "<u4", "C128": "<c16",
}  # fmt: skip
"""For each dtype an unsigned integer of its size, or two."""
TENSORS: dict[str, tuple[str, tuple[int, ...]]] = {
    **{f"model.{dtype.lower()}": (dtype, (3, 5)) for dtype in BITS},
    "model.matrix": ("F32", (7, 10)),
    "model.rows": ("BF16", (7, 3)),
    "model.cube": ("F16", (4, 3, 6)),
    "model.scalar": ("I64", ()),
    "model.empty": ("F32", (0, 4)),
    "model.ünïcode / 'quoted'": ("U8", (2,)),
    "optimizer.matrix.exp_avg": ("F32", (7, 10)),
    "optimizer.matrix.exp_avg_sq": ("F32", (7, 10)),
    "model.mosaic": ("I16", (5, 6)),
    "rng.rank0.torch_cpu": ("U8", (33,)),
}
"""Name -> dtype and shape of the tensors of the newest step."""
BOUNDS: dict[str, list[tuple[int, ...]]] = {
    "model.matrix": [(3,), ()],
    "optimizer.matrix.exp_avg": [(), (4,)],
    "model.rows": [(2, 5), ()],
    "model.cube": [(), (), (2, 5)],
}
"""Inner boundaries per dim of those that are cut; rows and cubes unevenly."""
BOXES: dict[str, list[Box]] = {
    "model.mosaic": [
        Box((0, 0), (2, 4)),
        Box((0, 4), (3, 2)),
        Box((2, 0), (3, 2)),
        Box((2, 2), (1, 2)),
        Box((3, 2), (2, 4)),
    ]
}
"""Boxes around another one, as no grid has them."""
FLAT: dict[str, list[int]] = {"optimizer.matrix.exp_avg_sq": [13, 41]}
"""Inner boundaries of those that are cut as if they were flat."""
OLDER: dict[str, tuple[str, tuple[int, ...]]] = {"model.matrix": ("F32", (7, 10))}
"""The same of the older steps."""
OBJECTS: dict[str, Any] = {
    "optimizer": {
        "groups": [{"params": ["matrix"], "lr": 0.1, "betas": {"$tuple": [0.9, 0.95]}}],
        "values": {},
    },
    "object.data": {
        "value": {
            "position": 12345678901234567890,
            "ratio": 0.1,
            "worst": {"$float": "inf"},
            "milestones": {"$pairs": [[30, 1], [60, 2]]},
            "none": None,
            "text": "ä\n",
        }
    },
}


def bits_of(name: str, dtype: str, shape: tuple[int, ...], step: int) -> npt.NDArray[Any]:
    """The bits of a tensor: a linear congruence of the index, started by name and step."""
    words_each = 2 if dtype == "C128" else 1
    count = int(np.prod(shape, dtype=np.int64)) * words_each
    start = sum(name.encode()) + 1000 * step
    values = [2654435761 * (index + 1) * (index + start) + start for index in range(count)]
    if dtype == "BOOL":
        values = [value >> 32 & 1 for value in values]
    words = np.array([value % 2**64 for value in values], np.uint64)
    if words_each == 2:
        return words.view(BITS[dtype]).reshape(shape)
    return words.astype(BITS[dtype]).reshape(shape)  # the low bits
