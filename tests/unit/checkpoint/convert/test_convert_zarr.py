"""The Zarr archive: zarr-python and TensorStore read it, damage in it is noticed."""

import math
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from torch import nn

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.convert import zarr_archive as archive
from everstep.checkpoint.convert.errors import ConversionError, TargetExistsError
from everstep.checkpoint.layout import ITEM_BYTES, TensorSpec
from everstep.checkpoint.open_place import open_place
from everstep.checkpoint.torch_state import State
from tests.support.written_steps import Cut, random_bits, write_step

MIB = 2**20


class Mixed(nn.Module):
    """Tensors of many shapes and types, one larger than several shards."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.big = nn.Parameter(torch.randn(700, 900, generator=random))
        self.wide = nn.Parameter(torch.randn(2, 300_001, generator=random))
        self.cube = nn.Parameter(torch.randn(30, 40, 50, generator=random))
        self.bf16 = nn.Parameter(torch.randn(9, 7, generator=random).bfloat16())
        self.register_buffer("zeros", torch.zeros(1000, dtype=torch.int64))
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("none", torch.empty(0, 3))


@pytest.fixture
def step(tmp_path: Path) -> Path:
    with Checkpointer(tmp_path / "c") as checkpointer:
        return Path(checkpointer.save(5, State(model=Mixed())).durable.result().path)


def test_zarr_and_tensorstore_read_it(step: Path, tmp_path: Path) -> None:
    told: list[int] = []
    with open_place(step).open() as reader:
        size = archive.export_zarr(
            reader, tmp_path / "z", what="model", budget_bytes=MIB, on_bytes=told.append
        )
        with pytest.raises(TargetExistsError):
            archive.export_zarr(reader, tmp_path / "z")
    expected = Mixed().state_dict()
    assert told[-1] == size == sum(t.numel() * t.element_size() for t in expected.values())
    group = zarr.open_group(tmp_path / "z", mode="r")
    assert group.attrs["step"] == 5
    assert {name for name, _ in group.arrays()} == expected.keys()
    for name, value in expected.items():
        array = group[name]
        bits = value.detach().view(torch.uint16) if name == "bf16" else value.detach()
        np.testing.assert_array_equal(array[...], bits.numpy())
        kvstore = {"driver": "file", "path": str(tmp_path / "z" / name)}
        other = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()
        np.testing.assert_array_equal(other.read().result(), bits.numpy())
    assert group["bf16"].attrs["everstep_dtype"] == "BF16"
    assert len(list((tmp_path / "z" / "big" / "c").rglob("*"))) > 5  # files of a bounded size


def test_every_dtype_is_read_bit_by_bit(tmp_path: Path) -> None:
    cuts = {dtype: Cut(dtype, random_bits((5, 3), dtype, 1)) for dtype in ITEM_BYTES}
    write_step(tmp_path / "c", cuts)
    with open_place(tmp_path / "c").open() as reader:
        archive.export_zarr(reader, tmp_path / "z", budget_bytes=MIB)
    group = zarr.open_group(tmp_path / "z", mode="r")
    for dtype, cut in cuts.items():
        array = group[dtype]
        assert array.attrs["everstep_dtype"] == dtype
        assert array[...].tobytes() == cut.bits.tobytes()
        kvstore = {"driver": "file", "path": str(tmp_path / "z" / dtype)}
        other = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()
        assert other.read().result().tobytes() == cut.bits.tobytes()
        (chunk,) = (p for p in (tmp_path / "z" / dtype / "c").rglob("*") if p.is_file())
        chunk.unlink()
        missing = array[...]
        assert missing.dtype.kind not in "fc" or np.isnan(missing).all()


def test_damage_is_noticed(step: Path, tmp_path: Path) -> None:
    with open_place(step).open() as reader:
        archive.export_zarr(reader, tmp_path / "z")
    chunks = (tmp_path / "z" / "model.bf16" / "c").rglob("*")
    (file,) = [path for path in chunks if path.is_file()]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_group(tmp_path / "z", mode="r")["model.bf16"][...]


@pytest.mark.parametrize(
    "shape", [(), (0, 3), (1,), (700, 900), (3, 2**20), (2, 3, 2**19), (5, 1, 1, 7), (2**22,)]
)
def test_shards_hold_whole_chunks_and_are_bounded(shape: tuple[int, ...]) -> None:
    for shard_bytes in (2**17, 2**20, 2**24):
        chunk, shard = archive.chunk_shapes(TensorSpec("t", "F32", shape), shard_bytes)
        assert len(chunk) == len(shard) == len(shape)
        assert math.prod(shard) * 4 <= shard_bytes
        assert all(s % c == 0 for s, c in zip(shard, chunk, strict=True))


def test_names_that_would_leave_the_folder(tmp_path: Path) -> None:
    model = nn.Module()
    model.register_parameter("a/b", nn.Parameter(torch.zeros(1)))
    with Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save(0, State(model=model))
    with (
        open_place(tmp_path / "c").open() as reader,
        pytest.raises(ConversionError, match="'a/b' cannot be the name of a folder"),
    ):
        archive.export_zarr(reader, tmp_path / "z", what="model")
    assert not (tmp_path / "z").exists()
