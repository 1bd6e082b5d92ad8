"""Micro batches reach the device in order, each started before the one before it is used."""

from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import pytest
import torch

from everstep.trainer.data import MicroBatch
from everstep.trainer.transfer import DeviceBatch, HostTransfer, in_flight, transfer_to


def batch(number: int) -> MicroBatch:
    row = np.arange(number, number + 3, dtype=np.int64)[None]
    return MicroBatch(row, row + 1, np.array([number]))


class Noted(HostTransfer):
    """Writes down what happens when."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def start(self, batch: MicroBatch) -> DeviceBatch:
        self.events.append(f"start {batch.sample_B[0]}")
        return super().start(batch)

    def finish(self, started: DeviceBatch) -> DeviceBatch:
        self.events.append(f"finish {started.sample_B[0]}")
        return super().finish(started)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, ""),
        (1, "start 0, finish 0, use 0"),
        (
            3,
            "start 0, start 1, finish 0, use 0, start 2, finish 1, use 1, finish 2, use 2",
        ),
    ],
)
def test_the_next_copy_is_under_way_while_a_batch_is_used(count: int, expected: str) -> None:
    noted = Noted()
    for moved in in_flight((batch(i) for i in range(count)), noted):
        noted.events.append(f"use {moved.sample_B[0]}")
    assert ", ".join(noted.events) == expected


def test_an_error_in_reading_passes_through() -> None:
    def broken() -> Iterator[MicroBatch]:
        yield batch(0)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(in_flight(broken(), HostTransfer()))


def test_on_the_cpu_nothing_is_copied() -> None:
    original = batch(7)
    (moved,) = in_flight([original], transfer_to(torch.device("cpu")))
    for field in fields(MicroBatch):
        tensor = getattr(moved, field.name)
        assert tensor.data_ptr() == getattr(original, field.name).ctypes.data
        np.testing.assert_array_equal(tensor.numpy(), getattr(original, field.name))


def test_a_device_batch_has_what_a_micro_batch_has() -> None:
    assert [f.name for f in fields(DeviceBatch)] == [f.name for f in fields(MicroBatch)]
