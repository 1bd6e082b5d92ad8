"""A shuffle that needs no memory: a keyed permutation of ``range(n)`` for every epoch.

Any element is computed on its own, so that a global sample index alone says what is read: no
state to save, the same order on any number of ranks, and a jump to the middle costs nothing.

Construction: the generalised Feistel network with cycle walking of Black and Rogaway, "Ciphers
with Arbitrary Finite Domains" (CT-RSA 2002), on pairs (left, right) below ``ceil(sqrt(n))``. The
round function is the SplitMix64 finaliser of Steele, Lea and Flood, "Fast Splittable Pseudorandom
Number Generators" (OOPSLA 2014), which also yields the round keys. It shuffles; it hides nothing:
no cryptographic strength is claimed or needed.
"""

import math

import numpy as np
import numpy.typing as npt

ROUNDS = 8
"""Feistel rounds; four make a pseudorandom permutation (Luby, Rackoff 1988), more cost little."""

PURPOSE = 0x64617461_6F726472
"""Keeps the data order apart from other uses of the same seed ("dataordr")."""

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1

UInt64s = npt.NDArray[np.uint64]
Int64s = npt.NDArray[np.int64]


def mix64(values: UInt64s) -> UInt64s:
    """SplitMix64's finaliser, a bijection of 64-bit words; arrays of at least one dim."""
    mixed = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def permute(indices: Int64s, epochs: Int64s, n: int, seed: int) -> Int64s:
    """Where element ``indices[i]`` of epoch ``epochs[i]`` lands; a bijection for each epoch.

    Args:
        indices: (B,) with 0 <= indices < n.
        epochs: (B,), at least 0; each has a permutation of its own.
        n: Size of the domain, 1 <= n < 2**62.
        seed: 0 <= seed < 2**63.

    Returns:
        (B,) int64, in ``range(n)``.
    """
    side = math.isqrt(n - 1) + 1
    keys = _round_keys(epochs, seed)
    result = _feistel(indices.astype(np.uint64), keys, side)
    # The network permutes range(side**2), a little more than range(n). Following the cycle until it
    # is back inside range(n) makes that a permutation of range(n).
    outside = np.flatnonzero(result >= n)
    while outside.size:
        result[outside] = _feistel(result[outside], keys[:, outside], side)
        outside = outside[result[outside] >= n]
    return result.astype(np.int64)


def _round_keys(epochs: Int64s, seed: int) -> UInt64s:
    """(ROUNDS, B): the SplitMix64 sequence that starts at a mix of seed and epoch."""
    of_seed = mix64(np.array([seed ^ PURPOSE], dtype=np.uint64))
    of_epoch = mix64(of_seed + epochs.astype(np.uint64) * np.uint64(_GOLDEN))
    steps = np.array([i * _GOLDEN & _MASK for i in range(1, ROUNDS + 1)], dtype=np.uint64)
    return mix64(of_epoch[None, :] + steps[:, None])


def _feistel(values: UInt64s, keys: UInt64s, side: int) -> UInt64s:
    """Permutes ``range(side**2)``; values (B,), keys (ROUNDS, B)."""
    modulus = np.uint64(side)
    left, right = np.divmod(values, modulus)
    for key in keys:
        left, right = right, (left + mix64(right ^ key) % modulus) % modulus
    return left * modulus + right
