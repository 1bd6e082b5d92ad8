"""The logical tensors of a live run, as digests that can be compared across layouts."""

import hashlib

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from everstep.trainer.engine import TorchEngine


def digest(tensor: torch.Tensor) -> str:
    """Of the bytes of a tensor, in C order."""
    data = np.ascontiguousarray(tensor.detach().numpy()).tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def logical_digests(engine: TorchEngine) -> dict[str, str]:
    """A digest of every logical tensor, whole, that this rank has a part of.

    A collective call: the ranks that share a tensor gather it.
    """
    model = dict(engine.model.named_parameters())
    whole = {f"model.{name}": parameter for name, parameter in model.items()}
    for name, parameter in model.items():
        for key, value in engine.optimizer.state[parameter].items():
            whole[f"optimizer.{name}.{key}"] = value
    found = {}
    for name, tensor in whole.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found[name] = digest(full)
    return found
