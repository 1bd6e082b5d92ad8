"""Tokens that lie in several arrays, read as if they were one."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

TokenArray = npt.NDArray[np.unsignedinteger[Any]]
"""(N,) tokens."""


class TokenRow:
    """Arrays of tokens, one after the other; nothing is copied until it is sliced.

    Args:
        parts: 1-D arrays of unsigned integers, in order; their types may differ.
    """

    def __init__(self, parts: Sequence[TokenArray]) -> None:
        self.arrays = [part for part in parts if part.size]
        """What is not empty of ``parts``."""
        self._starts = np.cumsum([0, *(part.size for part in self.arrays)])
        self.size = int(self._starts[-1])
        """Number of tokens."""
        dtypes = [part.dtype for part in self.arrays] or [np.dtype(np.uint8)]
        self.dtype: np.dtype[Any] = np.result_type(*dtypes)
        """The type that holds the tokens of all arrays."""

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, where: slice) -> TokenArray:
        """Tokens ``where.start`` to ``where.stop``; a view if they lie in one array."""
        views = self._views(where)
        return views[0] if len(views) == 1 else np.concatenate([*views, np.empty(0, self.dtype)])

    def part(self, start: int, stop: int) -> "TokenRow":
        """The row of the tokens from ``start`` to before ``stop``, without a copy."""
        return TokenRow(self._views(slice(start, stop)))

    def _views(self, where: slice) -> list[TokenArray]:
        start, stop, step = where.indices(self.size)
        if step != 1:
            raise ValueError(f"a row of tokens is sliced with step 1, not {step}")
        if start >= stop:
            return []
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        after = int(np.searchsorted(self._starts, stop, side="left"))
        bounds = pairwise(self._starts[first : after + 1].tolist())
        return [
            self.arrays[i][max(0, start - low) : min(high, stop) - low]
            for i, (low, high) in zip(range(first, after), bounds, strict=True)
        ]


Tokens = TokenArray | TokenRow
"""Either; both have ``size``, ``dtype``, and slices that are arrays."""


def arrays_of(tokens: Tokens) -> list[TokenArray]:
    """The arrays that tokens lie in, in order."""
    return tokens.arrays if isinstance(tokens, TokenRow) else [tokens]


def part_of(tokens: Tokens, start: int, stop: int) -> Tokens:
    """Tokens from ``start`` to before ``stop``, without a copy."""
    return tokens.part(start, stop) if isinstance(tokens, TokenRow) else tokens[start:stop]
