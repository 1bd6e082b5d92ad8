"""FORMAT.md is enough to read a checkpoint: another reader finds what was saved."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.layout import Box, Fragment, TensorSpec
from everstep.checkpoint.manifest import Part, build_manifest, encode_manifest
from everstep.checkpoint.pack import StridedBytes, plan_pack, write_pack
from everstep.checkpoint.step_reader import StepReader
from everstep.checkpoint.torch_state import State
from tests.support.checkpoints import Counter, ThreadCollective, run_threads
from tests.support.format_reader import read_checkpoint, read_record
from tests.support.fragments import flat_fragment


def _model() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    model.register_buffer("brief", torch.arange(6.0).bfloat16())
    model.register_buffer("flag", torch.tensor(True))
    model.register_buffer("empty", torch.zeros(0, 3))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) + 100 * number)
    return model


def _save(c: ThreadCollective, root: Path) -> None:
    state = State(model=_model(), data=Counter((1, float("inf"))))
    with Checkpointer(root, collective=c) as checkpointer:
        checkpointer.save(7, state)


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_page_is_enough_to_read_a_checkpoint(tmp_path: Path, world_size: int) -> None:
    assert run_threads(lambda c: _save(c, tmp_path), world_size) == [None] * world_size
    objects, tensors = read_checkpoint(tmp_path / "step-00000007-g00001")
    assert objects == {"object.data": {"value": {"$tuple": [1, {"$float": "inf"}]}}}
    for name, tensor in _model().state_dict().items():
        bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
        np.testing.assert_array_equal(tensors[f"model.{name}"], bits.numpy())
    generators = {name.rpartition(".")[0] for name in tensors if name.startswith("rng.")}
    assert generators == {f"rng.rank{rank}" for rank in range(world_size)}
    generation = read_record(tmp_path / "generations" / "00001.json")
    assert (generation["number"], generation["parent"], generation["fork_step"]) == (1, None, None)


def test_the_page_is_enough_to_read_boxes_and_flat_ranges(tmp_path: Path) -> None:
    shape, specs = (5, 4), [TensorSpec("b", "C128", (5, 4)), TensorSpec("f", "F32", (5, 4))]
    boxes = [Box((0, 0), (2, 4)), Box((2, 0), (3, 1)), Box((2, 1), (3, 3))]
    held = [
        [Fragment(specs[0], boxes[2]), flat_fragment(specs[1], 3, 13)],
        [*(Fragment(specs[0], b) for b in boxes[:2]), flat_fragment(specs[1], 0, 3)],
        [flat_fragment(specs[1], 13, 20)],
    ]
    whole = {
        "b": np.arange(20.0).reshape(shape) * 1j,
        "f": np.arange(20, dtype="f4").reshape(shape),
    }
    parts = []
    for rank, mine in enumerate(held):
        plan = plan_pack(rank, mine)

        def source_of(fragment: Fragment) -> StridedBytes:
            array = whole[fragment.spec.name]
            array = array.reshape(-1) if fragment.flat else array
            ends = zip(fragment.box.offset, fragment.box.shape, strict=True)
            items = np.ascontiguousarray(array[tuple(slice(o, o + n) for o, n in ends)])
            return StridedBytes(items.reshape(-1).view(np.uint8), 0, items.strides)

        record = write_pack(tmp_path / f"p{rank}", plan, source_of)
        context = {"mesh": {}, "producer": {}, "objects": {}}
        part = Part(
            generation=1, step=0, rank=rank, world_size=3, pack=record, fragments=plan.fragments,
            context=context,
        )  # fmt: skip
        parts.append(part)
    manifest = build_manifest(parts)
    (tmp_path / "manifest.json").write_bytes(encode_manifest(manifest))
    _, tensors = read_checkpoint(tmp_path)
    with StepReader(tmp_path, manifest) as reader:
        for name, array in whole.items():
            np.testing.assert_array_equal(tensors[name], array)
            assert reader.read(name).tobytes() == array.tobytes()
            part_of = np.ascontiguousarray(array[1:4, 1:3])
            assert reader.read(name, Box((1, 1), (3, 2))).tobytes() == part_of.tobytes()
