"""The keyed permutation against a scalar reference, and as a shuffle."""

import math

import numpy as np
import pytest

from everstep.trainer.data.permutation import PURPOSE, ROUNDS, mix64, permute

GOLDEN = 0x9E3779B97F4A7C15
MASK = 2**64 - 1


def slow_mix64(value: int) -> int:
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


def slow_permute(index: int, epoch: int, n: int, seed: int) -> int:
    """One element at a time, in Python integers."""
    side = math.isqrt(n - 1) + 1
    state = slow_mix64((slow_mix64(seed ^ PURPOSE) + epoch * GOLDEN) & MASK)
    keys = [slow_mix64((state + i * GOLDEN) & MASK) for i in range(1, ROUNDS + 1)]
    while True:
        left, right = divmod(index, side)
        for key in keys:
            left, right = right, (left + slow_mix64(right ^ key) % side) % side
        index = left * side + right
        if index < n:
            return index


def whole_epoch(n: int, epoch: int, seed: int = 0) -> np.ndarray:
    return permute(np.arange(n), np.full(n, epoch), n, seed)


def test_mix64_is_the_published_function() -> None:
    # First outputs of SplitMix64 with seed 0, as in the reference implementation's test vectors.
    states = np.array([GOLDEN, 2 * GOLDEN & MASK, 3 * GOLDEN & MASK], dtype=np.uint64)
    assert [hex(v) for v in mix64(states).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 1000, 48_245, 2**31 + 11, 2**61 - 1])
def test_equals_the_scalar_reference(n: int) -> None:
    rng = np.random.default_rng(n)
    indices = rng.integers(0, n, size=50)
    epochs = rng.integers(0, 2**40, size=50)
    for seed in (0, 7, 2**63 - 1):
        expected = [
            slow_permute(i, e, n, seed)
            for i, e in zip(indices.tolist(), epochs.tolist(), strict=True)
        ]
        assert permute(indices, epochs, n, seed).tolist() == expected


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 1000, 4096, 30_011])
def test_every_epoch_is_a_bijection(n: int) -> None:
    for epoch in (0, 1, 2, 12345):
        assert np.array_equal(np.sort(whole_epoch(n, epoch)), np.arange(n))


def test_elements_do_not_depend_on_their_neighbours() -> None:
    n = 1000
    together = permute(np.arange(n), np.arange(n) % 7, n, 3)
    alone = [int(permute(np.array([i]), np.array([i % 7]), n, 3)[0]) for i in range(0, n, 37)]
    assert together[::37].tolist() == alone


def test_epochs_and_seeds_have_different_orders() -> None:
    n = 500
    orders = [whole_epoch(n, epoch, seed) for epoch in range(5) for seed in range(5)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            # Unrelated permutations agree in one place on average.
            assert np.count_nonzero(first == second) < 10


@pytest.mark.parametrize("n", [10, 97, 1024])
def test_every_place_is_equally_likely(n: int) -> None:
    """Pearson's chi-square of where one element lands over many epochs."""
    epochs = 200 * n
    for index in (0, n // 2, n - 1):
        places = permute(np.full(epochs, index), np.arange(epochs), n, 0)
        counts = np.bincount(places, minlength=n)
        chi_square = ((counts - 200) ** 2 / 200).sum()
        # Mean n - 1, deviation sqrt(2 (n - 1)): five deviations either way.
        assert abs(chi_square - (n - 1)) < 5 * math.sqrt(2 * (n - 1))


def test_neighbours_are_torn_apart() -> None:
    order = whole_epoch(10_000, 0)
    assert np.count_nonzero(np.abs(np.diff(order)) == 1) < 15
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
