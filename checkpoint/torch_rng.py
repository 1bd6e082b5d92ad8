"""The random number generators of one rank as fixed-size byte tensors."""

import hashlib
import random
import struct
from collections.abc import Mapping

import numpy as np
import torch

from everstep.checkpoint.errors import StateError

_PYTHON = struct.Struct("<625I?d")
_NUMPY = struct.Struct("<624II?d")


def rng_states() -> dict[str, torch.Tensor]:
    """State of each generator, by name: torch CPU, torch CUDA (where there is one), Python, NumPy.

    Shapes: (n_bytes,), dtype uint8, a fixed n_bytes for each.
    """
    states = {"torch_cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["torch_cuda"] = torch.cuda.get_rng_state()
    _, words, gauss = random.getstate()
    states["python"] = _as_tensor(_PYTHON.pack(*words, gauss is not None, gauss or 0.0))
    twister = np.random.get_state(legacy=False)
    assert isinstance(twister, dict)
    if twister["bit_generator"] != "MT19937":
        raise StateError("numpy.random has another bit generator than its default, MT19937")
    keys, position = twister["state"]["key"], twister["state"]["pos"]
    normal = bool(twister["has_gauss"]), twister["gauss"]
    states["numpy"] = _as_tensor(_NUMPY.pack(*map(int, keys), position, *normal))
    return states


def set_rng_states(states: Mapping[str, torch.Tensor]) -> None:
    """Inverse of ``rng_states``; a generator that is not named is left alone."""
    if "torch_cpu" in states:
        torch.set_rng_state(states["torch_cpu"])
    if "torch_cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["torch_cuda"])
    if "python" in states:
        *words, has_gauss, gauss = _PYTHON.unpack(states["python"].numpy().tobytes())
        random.setstate((3, tuple(words), gauss if has_gauss else None))
    if "numpy" in states:
        *keys, position, has_gauss, cached = _NUMPY.unpack(states["numpy"].numpy().tobytes())
        np.random.set_state(
            ("MT19937", np.array(keys, dtype=np.uint32), position, int(has_gauss), cached)
        )


def derive_rng(seed: int, step: int, coordinate: str) -> None:
    """Seed all generators from (seed, step, mesh coordinate), where no state was saved."""
    digest = hashlib.blake2b(f"{seed}/{step}/{coordinate}".encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "little")
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value % 2**32)


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
