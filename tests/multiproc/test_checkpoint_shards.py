"""Boxes against real DTensors, names against real wrappers, exchanges over real process groups."""

import itertools
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

from everstep.checkpoint.errors import CollectiveError, LayoutError
from everstep.checkpoint.layout import Box, TensorSpec
from everstep.checkpoint.torch_collective import ProcessGroupCollective
from everstep.checkpoint.torch_layout import live_tensor
from everstep.checkpoint.torch_state import named_tensors
from tests.support.fragments import grid_of
from tests.support.spawn import run_ranks

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(300)]

SIZES = (1, 2, 3, 5, 7, 10, 13, 64, 1001)


def _numbered(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


def _check(name: str, tensor: DTensor) -> Box:
    """The local shard is exactly what its box of the numbered tensor says."""
    live = live_tensor(name, tensor)
    box = live.fragment.box
    slices = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
    assert live.local.numel() == box.size
    assert not box.size or torch.equal(live.local, _numbered(tuple(tensor.shape))[slices]), name
    return box


class Numbered(nn.Module):
    """Parameters of one size in each place, cut over ``tp`` as a tensor-parallel layer would."""

    def __init__(self, n: int, tp_mesh: Any) -> None:
        super().__init__()
        tp, rank = tp_mesh.size(), tp_mesh.get_local_rank()
        for name, shape, placement in (
            ("vector", (n,), Shard(0)),
            ("columns", (n, 3), Shard(0)),
            ("rows", (n, 3), Shard(1)),
            ("both", (n, n), Shard(1)),
            ("norm", (n,), Replicate()),
        ):
            whole = _numbered(shape)
            local = whole
            if isinstance(placement, Shard):
                pieces = whole.chunk(tp, placement.dim)
                nothing = whole.narrow(placement.dim, 0, 0)
                local = pieces[rank] if rank < len(pieces) else nothing
            sharded = DTensor.from_local(
                local.contiguous(),
                tp_mesh,
                [placement],
                run_check=False,
                shape=whole.shape,
                stride=whole.stride(),
            )
            self.register_parameter(name, nn.Parameter(sharded))


def _fsdp_over_tp(rank: int, world_size: int, dp: int, tp: int) -> dict[str, Box]:
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    boxes = {}
    for n in SIZES:
        model = Numbered(n, mesh["tp"])
        fully_shard(model, mesh=mesh["dp"])
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            boxes[f"{n} {name}"] = _check(f"{n} {name}", parameter)
            if name == "vector" and n > 1:
                assert any(isinstance(p, _StridedShard) for p in parameter.placements)
    return boxes


def _assert_tiled(boxes_by_rank: list[dict[str, Box]]) -> None:
    for key in boxes_by_rank[0]:
        size, name = key.split(" ")
        n = int(size)
        shape = {"columns": (n, 3), "rows": (n, 3), "both": (n, n)}.get(name, (n,))
        grid_of(TensorSpec(key, "F32", shape), (boxes[key] for boxes in boxes_by_rank))


@pytest.mark.parametrize(
    ("dp", "tp"),
    [(2, 2), (3, 2), (4, 2)],
    ids=["dp2xtp2", "dp3xtp2", "dp4xtp2"],
)
def test_boxes_of_fsdp_over_tensor_parallel(dp: int, tp: int) -> None:
    _assert_tiled(run_ranks(_fsdp_over_tp, dp * tp, dp, tp))


def _all_placements(rank: int, world_size: int) -> int:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    count = 0
    for n in SIZES:
        shape = (n, 5)
        kinds = [Replicate(), Shard(0), Shard(1)]
        for placements in itertools.product(kinds, repeat=2):
            tensor = distribute_tensor(_numbered(shape), mesh, placements)
            _check(f"{n} {placements}", tensor)
            count += 1
    zero = distribute_tensor(torch.zeros(0, 4), mesh, [Shard(0), Shard(1)])
    assert live_tensor("zero", zero).fragment.box == Box((0, 0), (0, 4))
    return count


def test_boxes_of_plain_placements() -> None:
    assert run_ranks(_all_placements, 4) == [9 * len(SIZES)] * 4


def _refused(rank: int, world_size: int) -> list[str]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("a",))
    other = init_device_mesh("cpu", (1, 2), mesh_dim_names=("b", "c"))
    tensors = {
        "partial": DTensor.from_local(torch.ones(2), mesh, [Partial()]),
        "lopsided": DTensor.from_local(
            torch.ones(1 + 2 * rank), mesh, [Shard(0)], shape=(4,), stride=(1,)
        ),
        "strided": DTensor.from_local(
            torch.ones(2), other, [Replicate(), _StridedShard(0, split_factor=2)], run_check=False
        ),
    }
    found = []
    for name, tensor in tensors.items():
        with pytest.raises(LayoutError) as caught:
            live_tensor(name, tensor)
        found.append(str(caught.value))
    return found


def test_layouts_that_cannot_be_saved_are_named() -> None:
    for partial, lopsided, strided in run_ranks(_refused, 2):
        assert "redistribute it first" in partial
        assert "the local shard is" in lopsided
        assert "strided by other than what follows" in strided


def _elsewhere(rank: int, world_size: int) -> tuple[int, int]:
    """What ranks hold of a tensor whose mesh is the first of them only."""
    mesh = DeviceMesh("cpu", [0])
    local = torch.ones(3, 2) if rank == 0 else torch.ones(0)
    tensor = DTensor.from_local(local, mesh, [Shard(0)], shape=(3, 2), stride=(2, 1))
    scalar = DTensor.from_local(torch.ones(()), mesh, [Replicate()], shape=(), stride=())
    return tuple(live_tensor(t, x).fragment.box.size for t, x in (("t", tensor), ("s", scalar)))  # type: ignore[return-value]


def test_a_tensor_on_a_mesh_of_other_ranks_is_theirs() -> None:
    assert run_ranks(_elsewhere, 2) == [(6, 1), (0, 0)]


def _build() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))


def _nestings(mesh: DeviceMesh) -> dict[str, nn.Module]:
    """Wrappers around blocks, and others around the whole, in every combination."""

    def plain(module: nn.Module) -> nn.Module:
        return module

    def compiled(module: nn.Module) -> Any:
        return torch.compile(module)

    def recomputed(module: nn.Module) -> Any:
        return checkpoint_wrapper(module)

    def sharded(module: nn.Module) -> Any:
        return fully_shard(module, mesh=mesh)

    orders = [
        (plain,), (compiled,), (recomputed,), (sharded,), (compiled, recomputed),
        (recomputed, compiled), (sharded, compiled), (sharded, recomputed), (compiled, sharded),
        (sharded, recomputed, compiled), (sharded, compiled, recomputed),
    ]  # fmt: skip
    ddp = DistributedDataParallel
    roots = [*orders, (ddp,), (ddp, compiled), (compiled, ddp), (ddp, recomputed, compiled)]
    found = {}
    for inner, outer in itertools.product(orders, roots):
        if sharded in inner and ddp in outer:
            continue
        model: Any = _build()
        for wrap in reversed(inner):
            model[1] = wrap(model[1])
        for wrap in reversed(outer):
            model = wrap(model)
        key = " of ".join("(".join(w.__name__ for w in order) for order in (outer, inner))
        found[key] = model
    return found


def _wrapped_names(rank: int, world_size: int) -> dict[str, list[str]]:
    mesh = init_device_mesh("cpu", (2,))
    models = _nestings(mesh)
    gathered = fully_shard(_build(), mesh=mesh)
    with torch.no_grad():
        gathered(torch.ones(2, 2))  # leaves the root gathered
    named = named_tensors(gathered)
    assert all(isinstance(t, DTensor) for t in named.values() if t.requires_grad)
    return {k: sorted(named_tensors(m)) for k, m in models.items()} | {"gathered": sorted(named)}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_names_do_not_depend_on_wrappers_in_any_nesting() -> None:
    expected = sorted(named_tensors(_build()))
    assert "1.0.weight" in expected
    for names in run_ranks(_wrapped_names, 2):
        assert len(names) > 100
        assert {nesting for nesting, found in names.items() if found != expected} == set()


def _exchange(rank: int, world_size: int) -> Any:
    collective = ProcessGroupCollective(timeout_s=20)
    assert (collective.rank, collective.world_size) == (rank, world_size)
    payloads = [bytes([r]) * (r * 70_000) for r in range(world_size)]
    assert collective.exchange("sizes", payloads[rank]) == payloads
    assert collective.exchange("nothing", b"") == [b""] * world_size
    with pytest.raises(CollectiveError, match="out of step"):
        collective.exchange(f"tag {rank}", b"x")
    dist.barrier()
    return collective.exchange("again", b"%d" % rank)


def test_exchanges_over_a_process_group() -> None:
    assert run_ranks(_exchange, 3) == [[b"0", b"1", b"2"]] * 3


def _lost(rank: int, world_size: int) -> str:
    collective = ProcessGroupCollective(timeout_s=1)
    if rank == 0:
        with pytest.raises(CollectiveError) as caught:
            collective.exchange("alone", b"x")
        return str(caught.value)
    time.sleep(3)
    return ""


def test_a_rank_that_does_not_come_is_noticed_in_time() -> None:
    assert "rank 0 lost contact with the other ranks at 'alone'" in run_ranks(_lost, 2)[0]
