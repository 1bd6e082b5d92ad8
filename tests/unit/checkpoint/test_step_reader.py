"""Reading boxes of a committed checkpoint without torch."""

from pathlib import Path

import numpy as np
import pytest
import torch

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.errors import BlockChecksumError
from everstep.checkpoint.layout import Box
from everstep.checkpoint.pack import StridedBytes
from everstep.checkpoint.step_reader import StepReader
from everstep.checkpoint.torch_state import State


@pytest.fixture
def saved(tmp_path: Path) -> tuple[StepReader, torch.nn.Module]:
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3).to(torch.bfloat16))
    with Checkpointer(tmp_path) as writer:
        writer.save(3, State(model=model))
    directory = CheckpointDirectory(tmp_path)
    found = directory.find(3)
    assert found is not None
    return StepReader(directory.step_path(found), directory.manifest(found)), model


def test_a_whole_tensor_and_a_box_of_it_are_read(
    saved: tuple[StepReader, torch.nn.Module],
) -> None:
    reader, model = saved
    expected = model[0].weight.detach().numpy()
    with reader:
        whole = reader.read("model.0.weight").view("<f4").reshape(7, 5)
        part = reader.read("model.0.weight", Box((2, 1), (3, 4))).view("<f4").reshape(3, 4)
        none = reader.read("model.0.weight", Box((2, 1), (0, 4)))
        half = reader.read("model.1.bias").view("<u2")
        reader.verify(0)
        with pytest.raises(KeyError):
            reader.read("model.2.weight")
    np.testing.assert_array_equal(whole, expected)
    np.testing.assert_array_equal(part, expected[2:5, 1:5])
    assert none.size == 0
    bits = model[1].bias.detach().view(torch.uint16).numpy()
    np.testing.assert_array_equal(half, bits)


def test_a_box_is_filled_into_the_middle_of_an_array(
    saved: tuple[StepReader, torch.nn.Module],
) -> None:
    reader, model = saved
    array = np.zeros((6, 9), "<f4")
    target = StridedBytes(array.reshape(-1).view(np.uint8), 4 * (9 + 2), (9 * 4, 4))
    with reader:
        reader.fill("model.0.weight", Box((1, 0), (4, 5)), target)
    expected = np.zeros((6, 9), "<f4")
    expected[1:5, 2:7] = model[0].weight.detach().numpy()[1:5]
    np.testing.assert_array_equal(array, expected)


def test_damage_is_found_where_it_is_read(saved: tuple[StepReader, torch.nn.Module]) -> None:
    reader, _ = saved
    record = reader.manifest.packs[0]
    path = reader.step_path / record.file
    data = bytearray(path.read_bytes())
    data[record.data_start + 1] ^= 1
    path.write_bytes(data)
    with reader, pytest.raises(BlockChecksumError):
        reader.read("model.0.weight")
    with reader, pytest.raises(BlockChecksumError):
        reader.verify(0)
