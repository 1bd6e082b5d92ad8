"""Exports to one file and conversions by a spec: what is read back, what is never left behind."""

import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import nn

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.convert.atomic import MIN_BUDGET_BYTES, block_bytes, new_target
from everstep.checkpoint.convert.errors import (
    ConversionError,
    MissingPackageError,
    TargetExistsError,
)
from everstep.checkpoint.convert.formats import EXPORTS, IMPORTS, Format
from everstep.checkpoint.convert.plain import convert, export_safetensors
from everstep.checkpoint.convert.source import read_box
from everstep.checkpoint.convert.step_source import StepSource
from everstep.checkpoint.convert.step_writer import cut_rows
from everstep.checkpoint.convert.torch_file import export_torch
from everstep.checkpoint.errors import BlockChecksumError
from everstep.checkpoint.layout import TensorSpec
from everstep.checkpoint.open_place import open_place
from everstep.checkpoint.torch_state import State
from tests.support import checkpoints

MIB = 2**20


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    first = nn.Linear(700, 900)
    return nn.Sequential(first, nn.BatchNorm1d(900), nn.Linear(900, 3, dtype=torch.bfloat16))


@pytest.fixture
def step(tmp_path: Path, model: nn.Module) -> Path:
    with Checkpointer(tmp_path / "run" / "checkpoints") as checkpointer:
        return Path(checkpointer.save(3, State(model=model)).durable.result().path)


def test_one_file_for_safetensors_and_for_torch(
    step: Path, tmp_path: Path, model: nn.Module
) -> None:
    told: list[int] = []
    with open_place(step).open() as reader:
        size = export_safetensors(reader, tmp_path / "a", budget_bytes=MIB, on_bytes=told.append)
        assert export_torch(reader, tmp_path / "b.pt", budget_bytes=MIB) == size == told[-1]
    found = [
        load_file(tmp_path / "a"),
        torch.load(tmp_path / "b.pt", weights_only=True),
        torch.load(tmp_path / "b.pt", weights_only=True, mmap=True),
    ]
    for tensors in found:
        assert tensors.keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert tensors[name].dtype == value.dtype
            assert torch.equal(tensors[name], value)
            tensors[name].data_ptr()
    assert found[2]["0.weight"].data_ptr() % 64 == 0
    assert zipfile.ZipFile(tmp_path / "b.pt").testzip() is None  # its checksums are right


def test_everything_in_another_dtype(step: Path, tmp_path: Path, model: nn.Module) -> None:
    with open_place(step).open() as reader:
        export_torch(reader, tmp_path / "b.pt", what="everything", dtype="BF16")
    found = torch.load(tmp_path / "b.pt", weights_only=True)
    assert any(name.startswith("rng.") for name in found)
    for name, value in model.state_dict().items():
        expected = value.bfloat16() if value.is_floating_point() else value
        assert torch.equal(found[f"model.{name}"], expected)


def test_buffers_keep_to_the_budget(tmp_path: Path) -> None:
    model = nn.ModuleList(nn.Linear(1000, 1500) for _ in range(3))  # 6 MB each
    with Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save(0, State(model=model))

    def peak_bytes(action: Callable[[], object]) -> int:
        tracemalloc.start()
        try:
            action()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    with open_place(tmp_path / "c").open() as reader:
        reader.read("model.0.bias")  # the manifest's tables
        for name, export, dtype in (
            ("a", export_safetensors, None),
            ("b", export_safetensors, "BF16"),
            ("c.pt", export_torch, "BF16"),
        ):
            target = tmp_path / name
            export(reader, target.with_suffix(".warm"))
            used = peak_bytes(
                lambda e=export, t=target, d=dtype: e(reader, t, dtype=d, budget_bytes=2 * MIB)
            )
            assert used < 2 * MIB, name
    used = peak_bytes(
        lambda: convert(
            "everything", tmp_path / "a", tmp_path / "d", form="checkpoint", budget_bytes=4 * MIB
        )
    )
    assert used < 4 * MIB  # cut into packs of rows


def test_a_target_that_exists_is_left_alone(step: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    with open_place(step).open() as reader:
        for export in (export_safetensors, export_torch):
            with pytest.raises(TargetExistsError, match="is never overwritten"):
                export(reader, taken)
    assert taken.read_text() == "mine"


def test_nothing_is_left_of_a_conversion_that_failed(step: Path, tmp_path: Path) -> None:
    (pack,) = step.glob("*.safetensors")
    data = bytearray(pack.read_bytes())
    data[-4 - MIB] ^= 1
    pack.write_bytes(data)
    before = sorted(tmp_path.iterdir())
    with open_place(step).open() as reader:
        for export in (export_safetensors, export_torch):
            with pytest.raises(BlockChecksumError):
                export(reader, tmp_path / "x", budget_bytes=MIB)
    assert sorted(tmp_path.iterdir()) == before


def test_somebody_else_was_faster(tmp_path: Path) -> None:
    for make in (lambda path: path.write_text("mine"), lambda path: path.mkdir()):
        target = tmp_path / "target"
        with pytest.raises(TargetExistsError):
            _lose_race(target, make)
        assert [p.name for p in tmp_path.iterdir()] == ["target"]
        assert target.read_text() == "theirs"
        target.unlink()


def _lose_race(target: Path, make: Callable[[Path], object]) -> None:
    with new_target(target) as path:
        make(path)
        target.write_text("theirs")


def test_budgets() -> None:
    assert block_bytes(2**40) == 16 * MIB
    assert block_bytes(MIN_BUDGET_BYTES) == 128 * 1024
    with pytest.raises(ValueError, match="is too small"):
        block_bytes(MIN_BUDGET_BYTES - 1)


def test_rows_are_cut_so_that_a_fragment_fits() -> None:
    tensors = {
        name: TensorSpec(name, "F32", shape)
        for name, shape in {"big": (10, 8), "small": (3, 2), "flat": (40,), "none": (0, 3)}.items()
    }
    layouts = cut_rows(tensors, 100)
    assert len(layouts) == 4  # 3 of 10 rows of 32 bytes in each
    for name, tensor in tensors.items():
        boxes = [f.box for layout in layouts for f in layout if f.spec.name == name]
        assert sum(box.size for box in boxes) == tensor.whole.size
        assert all(box.size * 4 <= 100 for box in boxes)


SPEC = """
name: ranks
with_file: true
rules:
  - logical: ["h.{layer#}.q", "h.{layer#}.k"]
    stored: "rank_{rank#}/blocks.{layer#}.qk"
    over: rank
    sharded: 1
    transposed: true
    fused: {dim: 0, sizes: [4, 2]}
  - {logical: norm, stored: "rank_{rank#}/norm", over: rank, replicated: true}
drop: {stored: "{file}/step"}
"""


def test_files_of_ranks_become_a_checkpoint_by_a_spec(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(SPEC)
    (tmp_path / "in").mkdir()
    whole = np.arange(5 * 6, dtype="<f4").reshape(5, 6)
    for rank in range(2):
        tensors = {
            "blocks.0.qk": np.ascontiguousarray(whole[:, 3 * rank : 3 * rank + 3]),
            "norm": np.ones(5, "<f4"),
            "step": np.arange(1),
        }
        save_file(tensors, tmp_path / "in" / f"rank_{rank}.safetensors")
    size = convert(tmp_path / "spec.yaml", tmp_path / "in", tmp_path / "out", form="checkpoint")
    assert size == (30 + 5) * 4
    with open_place(tmp_path / "out").open() as reader:
        source = StepSource(reader)
        assert sorted(source.tensors) == ["h.0.k", "h.0.q", "norm"]
        found = read_box(source, "h.0.k", source.tensors["h.0.k"].whole).view("<f4")
        np.testing.assert_array_equal(found.reshape(2, 5), whole.T[4:])
    convert("everything", tmp_path / "out", tmp_path / "one.safetensors", direction="extract")
    assert sorted(load_file(tmp_path / "one.safetensors")) == ["h.0.k", "h.0.q", "norm"]
    (tmp_path / "in" / "rank_0.safetensors").unlink()
    with pytest.raises(ConversionError, match="fragments"):
        convert(tmp_path / "spec.yaml", tmp_path / "in", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_an_optimizer_is_left_out_of_the_model(tmp_path: Path) -> None:
    state = checkpoints.tiny_state()
    with Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save(0, state)
    with open_place(tmp_path / "c").open() as reader:
        export_safetensors(reader, tmp_path / "m")
    assert load_file(tmp_path / "m").keys() == state.model.state_dict().keys()


def test_formats_name_functions_and_what_they_need() -> None:
    for found in (*EXPORTS.values(), *IMPORTS.values()):
        function = found.load()
        assert {*found.options, "budget_bytes", "on_bytes"} <= {*function.__kwdefaults__}
    lacking = Format(
        name="x",
        help="",
        function_name="a:b",
        options=(),
        packages={"no_such_package": "views"},
    )
    with pytest.raises(MissingPackageError, match=r"pip install 'everstep\[views\]'"):
        lacking.load()
