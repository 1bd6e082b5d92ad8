"""Random numbers of a data pipeline as a function of the data, apart from those of training.

A loader fetches ahead, and a loader that resumes skips batches without fetching them. So whatever
is random in items and collation (masking, augmentation) may depend only on which batch it is, and
must leave the generators that dropout uses as they were.
"""

import contextlib
import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset


class DataRandomness:
    """The CPU generators as the data pipeline sees them.

    Args:
        seed: of the run; the same on all ranks.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._epoch = 0
        self._held: tuple[Any, ...] | None = None
        self._items: SeededItems | None = None

    def watch(self, loader: DataLoader[Any]) -> None:
        """From now on, each batch of this loader is random as a function of its indices.

        A stream that has no indices is left as it is: to resume, it is read again from the start of
        the epoch, with the random numbers that it had then.
        """
        inner = getattr(loader, "base_dataloader", loader)
        if not isinstance(inner.dataset, IterableDataset | SeededItems):
            # the loader forbids it for the sake of its sampler, which sees the same length
            object.__setattr__(inner, "dataset", SeededItems(inner.dataset, self._seed))
        self._items = inner.dataset if isinstance(inner.dataset, SeededItems) else None

    def begin_epoch(self, epoch: int) -> None:
        """Seed anew; to be called before an epoch's first batch is fetched."""
        self._epoch, self._held = epoch, None
        if self._items is not None:
            self._items.epoch = epoch

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """What runs inside draws from the pipeline's generators, and from them alone."""
        outside = _generators()
        if self._held is None:
            _seed_generators(f"{self._seed}/{self._epoch}")
        else:
            _set_generators(self._held)
        try:
            yield
        finally:
            self._held = _generators()
            _set_generators(outside)


class SeededItems(Dataset[Any]):
    """A dataset whose batches are seeded by their indices, the epoch and the run's seed.

    Works in worker processes, too, unless these outlive an epoch.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset, self._seed = dataset, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[index]

    def __getitems__(self, indices: Sequence[Any]) -> Any:
        """The items of one batch; the collation that follows draws on from the same seed."""
        _seed_generators(f"{self._seed}/{self.epoch}/{list(indices)}")
        if hasattr(self._dataset, "__getitems__"):
            return self._dataset.__getitems__(indices)
        return [self._dataset[index] for index in indices]

    def __getattr__(self, name: str) -> Any:
        if name == "_dataset":  # asked for while a worker process is being given its copy
            raise AttributeError(name)
        return getattr(self._dataset, name)


def _generators() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def _set_generators(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])


def _seed_generators(text: str) -> None:
    """Only those of the CPU: seeding that of a GPU would change the dropout there."""
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
