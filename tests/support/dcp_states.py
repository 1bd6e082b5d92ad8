"""States that torch DCP saves and loads through our storage."""

import enum
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from everstep.checkpoint.views.dcp import StorageReader, StorageWriter


class Colour(enum.IntEnum):
    """What JSON would not give back."""

    RED = 1


def nested_state(seed: int = 0) -> dict[str, Any]:
    """Tensors and objects of every kind."""
    torch.manual_seed(seed)
    matrix = torch.randn(6, 8)
    return {
        "model": {"w": matrix, "turned": matrix.T, "every": matrix[::2, 1::3]},
        "scalar": torch.tensor(float(seed)),
        "nothing": torch.empty(0, 3),
        "groups": [{"lr": 0.1 + seed, "betas": (0.9, 0.95)}, {"moment": torch.arange(5)}],
        "limits": [float("inf"), None, True, ({3: 1}, 2)],
        "colour": Colour.RED,
        "free": complex(1, seed),
    }


def save_dcp(path: Path, state: dict[str, Any], **options: Any) -> None:
    """``dcp.save`` through our storage, in one process."""
    dcp.save(state, storage_writer=StorageWriter(path), no_dist=True, **options)


def load_dcp(path: Path, state: dict[str, Any], **options: Any) -> dict[str, Any]:
    """``dcp.load`` through our storage, in one process; the state itself."""
    dcp.load(state, storage_reader=StorageReader(path), no_dist=True, **options)
    return state


def everything(path: Path) -> dict[str, Any]:
    """What DCP rebuilds of a checkpoint alone."""
    return _load_state_dict_from_keys(storage_reader=StorageReader(path))


def same_state(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_state, a, b))
    return type(a) is type(b) and bool(a == b)


def zeroed(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {k: zeroed(v) for k, v in value.items()}
    return [zeroed(v) for v in value] if isinstance(value, list) else None


def cause_of(raised: pytest.ExceptionInfo[CheckpointException]) -> BaseException:
    return raised.value.failures[0][0]
