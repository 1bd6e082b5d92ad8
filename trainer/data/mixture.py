"""Which source a sample of a mixture comes from: a pure function of its index, O(1) each.

The samples of a run are parted into blocks of equal length. In the first b blocks, a source has
``b * block * share`` samples, to within one: the cumulative shares are rounded, so that the
counts add up and never drift from the weights, however long the run. Inside of a block a keyed
permutation orders them. Everything is integer arithmetic: the same on every machine.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from everstep.trainer.data.permutation import mix64, permute
from everstep.trainer.errors import DataError

SHARE_BITS = 30
"""Shares are multiples of 2**-SHARE_BITS."""

SMALLEST_BLOCK_BITS = 10
LARGEST_BLOCK_BITS = 20
_PURPOSE = 0x6D69_7874_7572_6531  # "mixture1"
_GOLDEN = 0x9E3779B97F4A7C15

Int64s = npt.NDArray[np.int64]


class Mixture:
    """Draws sources in proportion to ``weights``, without chance.

    Args:
        weights: One per source, greater than 0; only their ratios matter.
        seed: Decides the order inside of blocks.

    Raises:
        DataError: a share is smaller than a millionth.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self._bounds = cumulative_shares(weights)
        smallest = int(np.diff(self._bounds).min())
        # A share of at least one sample in a block: with less, rounding could make counts decrease.
        needed_bits = SHARE_BITS - max(1, smallest).bit_length() + 1
        if smallest < 1 or needed_bits > LARGEST_BLOCK_BITS:
            raise DataError(
                f"the weights {', '.join(f'{w:g}' for w in weights)} of data.source leave one "
                "source less than a millionth of the samples; raise its weight or leave it out"
            )
        self._block_bits = max(SMALLEST_BLOCK_BITS, needed_bits)
        self._seed = (seed ^ _PURPOSE) & (2**63 - 1)

    @property
    def block(self) -> int:
        """Samples in a block."""
        return 1 << self._block_bits

    @property
    def shares(self) -> list[float]:
        """Share of each source; their sum is 1."""
        return [int(size) / 2**SHARE_BITS for size in np.diff(self._bounds)]

    def choose(self, samples_B: Int64s) -> tuple[Int64s, Int64s]:
        """Source of each sample, and how many samples of that source lie before it.

        Both (B,), for (B,) global sample indices. Over the whole run, every source's samples are
        numbered from 0 without gaps; "before" is in an order that a block has of its own.
        """
        blocks_B, offsets_B = np.divmod(samples_B, self.block)
        slots_B = permute(offsets_B, blocks_B, self.block, self._seed)
        before_BS = self._cumulative_counts(blocks_B)
        ends_BS = self._cumulative_counts(blocks_B + 1) - before_BS
        sources_B = (slots_B[:, None] >= ends_BS[:, 1:]).sum(axis=1)
        rows_B = np.arange(samples_B.size)
        drawn_B = before_BS[rows_B, sources_B + 1] - before_BS[rows_B, sources_B]
        return sources_B, drawn_B + slots_B - ends_BS[rows_B, sources_B]

    def quotas(self, samples: int) -> list[int]:
        """How many of a closed set of ``samples`` each source gets; their sum is ``samples``."""
        bounds = [samples * int(bound) >> SHARE_BITS for bound in self._bounds]
        return [after - before for before, after in pairwise(bounds)]

    def _cumulative_counts(self, blocks_B: Int64s) -> Int64s:
        """(B, S + 1): samples of all sources before each one, in all blocks before each block."""
        bits = SHARE_BITS - self._block_bits
        high_B, low_B = blocks_B >> bits, blocks_B & ((1 << bits) - 1)  # no product overflows
        bounds_S = self._bounds[None, :]
        return high_B[:, None] * bounds_S + (low_B[:, None] * bounds_S >> bits)


def cumulative_shares(weights: Sequence[float]) -> Int64s:
    """(S + 1,): sums of the shares before each source, times 2**SHARE_BITS; from 0 to all."""
    exact = [Fraction(weight) for weight in weights]
    sums = [sum(exact[:count], Fraction(0)) for count in range(len(exact) + 1)]
    return np.array([round(part / sums[-1] * 2**SHARE_BITS) for part in sums], dtype=np.int64)


def seed_of_source(seed: int, source: int) -> int:
    """The seed of a source's own shuffle; the run's for the first, so that one alone is as ever."""
    if source == 0:
        return seed
    mixed = mix64(np.array([(seed + source * _GOLDEN) % 2**64], dtype=np.uint64))
    return int(mixed[0] >> np.uint64(1))
