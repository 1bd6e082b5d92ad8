"""Randomness of a data pipeline: of the batch, and of nothing else."""

import random
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from everstep.integrations.hf_data import DataRandomness, SeededItems


class Noise(Dataset[float]):
    """Each item draws from all three generators."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> float:
        return index + random.random() + float(np.random.rand()) + float(torch.rand(()))


class NoiseStream(IterableDataset[float]):
    def __iter__(self) -> Any:
        return (Noise()[i] for i in range(12))


def batches(data: Any, *, skip: int = 0, epoch: int = 0, workers: int = 0) -> list[list[float]]:
    """The batches of an epoch after the first few, which indices allow to leave out."""
    torch.manual_seed(skip)
    randomness = DataRandomness(1)
    order = [list(range(i, i + 3)) for i in range(0, 12, 3)][skip:]
    by_index = {} if isinstance(data, IterableDataset) else {"batch_sampler": order}
    loader: DataLoader[Any] = DataLoader(
        data, num_workers=workers, collate_fn=list, **(by_index or {"batch_size": 3})
    )
    randomness.watch(loader)
    randomness.begin_epoch(epoch)
    found, source = [], iter(loader)
    while True:
        outside = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        with randomness.apart():
            batch = next(source, None)
        assert torch.equal(outside[0], torch.get_rng_state())
        assert outside[1:] == (random.getstate(), np.random.get_state()[1].tolist())
        if batch is None:
            return found
        found.append(batch)


def test_a_batch_is_the_same_whatever_was_fetched_before() -> None:
    assert batches(Noise(), skip=2) == batches(Noise())[2:]


def test_a_batch_is_the_same_in_a_worker_process() -> None:
    assert batches(Noise(), workers=1) == batches(Noise())


def test_every_epoch_has_its_own() -> None:
    first, second = batches(Noise()), batches(Noise(), epoch=1)
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_a_stream_that_is_read_again_is_the_same() -> None:
    assert batches(NoiseStream()) == batches(NoiseStream())
    assert batches(NoiseStream()) != batches(NoiseStream(), epoch=1)


def test_a_loader_is_watched_once() -> None:
    randomness, loader = DataRandomness(1), DataLoader(Noise())
    randomness.watch(loader)
    seeded = loader.dataset
    randomness.watch(loader)
    assert loader.dataset is seeded


def test_a_seeded_dataset_still_is_what_it_was() -> None:
    class Named(Noise):
        name = "a name"

        def __getitems__(self, indices: list[int]) -> list[str]:
            return [f"item {i}" for i in indices]

    items = SeededItems(Named(), 1)
    assert (items.name, len(items)) == ("a name", 12)
    assert items.__getitems__([3, 4]) == ["item 3", "item 4"]
    assert 3 < items[3] < 6
