"""Dropout whose mask depends on what is dropped, not on who computes it.

The mask is a hash of (seed, global sample index, token position, layer, site, channel). Any number
of ranks, any slice of batch or sequence, recomputation in activation checkpointing and a resume all
see the same mask, and no generator state has to be kept. Sharding the channels is not supported:
the residual stream that it is used on is never sharded over channels.

A token gets a 32-bit key per layer and site; every pair of channels mixes it with a key of its own
through multiply and xor-shift rounds (the finaliser of MurmurHash3 with fewer steps and signed
shifts), and each 16-bit half of the result decides one channel. A few passes over int32 tensors of
half the size of the activation: several times cheaper than torch's CPU generator.
"""

import hashlib

import torch
from torch import Tensor, nn

# Odd 32-bit constants of xxHash32 (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D), as int32.
_MIX_A, _MIX_B, _MIX_C = -1640531535, -2048144777, -1028477379
_LEVELS = 1 << 16


class TokenKeys(nn.Module):
    """32-bit keys of the tokens of a batch, from the seed, their sample and their position."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = _key_of(seed, "tokens")

    def forward(self, sample_B: Tensor, seq_len: int) -> Tensor:
        """Keys (B, L), int64 in [0, 2**32), of ``seq_len`` tokens of samples ``sample_B``."""
        position_L = torch.arange(seq_len, dtype=torch.int64, device=sample_B.device)
        sample_B = sample_B.to(torch.int64)
        high_B = _scramble(_scramble(self._seed ^ (sample_B >> 32)) ^ (sample_B & 0xFFFFFFFF))
        return _scramble(high_B[:, None] ^ position_L)


def keys_of_layer(keys_BL: Tensor, layer: int) -> Tensor:
    """The keys of the same tokens in another layer.

    Mixed in here rather than in ``LayoutFreeDropout``, so that all blocks run the same code and
    are compiled once.
    """
    return _scramble(keys_BL ^ _key_of(layer, "layer"))


class LayoutFreeDropout(nn.Module):
    """Zeroes a fraction ``p`` of the activations in training and scales up the rest.

    ``p`` is rounded to a multiple of 2**-16. ``site`` tells the places in a layer apart.
    """

    def __init__(self, p: float, *, dim: int, site: str) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"dim={dim} is odd: dropout decides channels in pairs")
        dropped = round(p * _LEVELS)
        self.p = dropped / _LEVELS
        self._first_kept = dropped - _LEVELS // 2
        self._site = _key_of(0, site)
        self._dim = dim

    def forward(self, x_BLD: Tensor, keys_BL: Tensor | None) -> Tensor:
        """``x_BLD`` with the mask of the tokens of ``keys_BL``; unchanged where keys are None."""
        if keys_BL is None or self.p == 0:
            return x_BLD
        return x_BLD * self.keep(keys_BL) * (1 / (1 - self.p))

    def keep(self, keys_BL: Tensor) -> Tensor:
        """The mask (B, L, D), bool: True where the activation stays."""
        row_BL1 = _to_int32(_scramble(keys_BL ^ self._site))[..., None]
        pair = torch.arange(self._dim // 2, dtype=torch.int64, device=keys_BL.device)
        hash_BLP = row_BL1 ^ _to_int32(_scramble(pair ^ ~self._site & 0xFFFFFFFF))
        hash_BLP *= _MIX_A
        hash_BLP ^= hash_BLP >> 16
        hash_BLP *= _MIX_B
        hash_BLP ^= hash_BLP >> 15
        hash_BLP *= _MIX_C  # last, because a signed shift leaves the sign bit clear
        return hash_BLP.view(torch.int16) >= self._first_kept

    def extra_repr(self) -> str:
        return f"p={self.p}"


def _key_of(number: int, name: str) -> int:
    digest = hashlib.sha256(f"everstep dropout {name} {number}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def _scramble(x: Tensor) -> Tensor:
    """A bijection on 32-bit numbers held in int64 (C. Wellons' lowbias32, public domain)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def _to_int32(x: Tensor) -> Tensor:
    """The 32-bit numbers in int64 ``x``, as int32 of the same bits."""
    return torch.where(x >= 1 << 31, x - (1 << 32), x).to(torch.int32)
