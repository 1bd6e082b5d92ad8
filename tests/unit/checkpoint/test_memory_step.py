"""A snapshot in the memory of ranks is read like a checkpoint: here, on other nodes, or mixed."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from everstep.checkpoint.assembly import Assembly
from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.errors import (
    BlockChecksumError,
    CheckpointError,
    KeeperError,
    LayoutError,
    ManifestChecksumError,
    ManifestError,
    PackHeaderError,
    PackTruncatedError,
)
from everstep.checkpoint.keeper.access import new_token
from everstep.checkpoint.keeper.remote_slots import RemoteSlots
from everstep.checkpoint.keeper.transport import DataPlane
from everstep.checkpoint.kernels import crc32c
from everstep.checkpoint.layout import Box
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.manifest import decode_part, encode_part
from everstep.checkpoint.pack import BLOCK_BYTES
from everstep.checkpoint.snapshots.memory_step import HeldSlot, MemoryStep, RemoteMemory
from everstep.checkpoint.store_memory import MemoryStore
from everstep.checkpoint.torch_load import fill_together
from everstep.checkpoint.torch_state import State, tensors_of
from tests.support.checkpoints import ThreadCollective, ThreadPeers, bits, run_threads
from tests.support.memory_slots import FakeSlots, seal_and_part, sealed_slots, slot_of
from tests.support.written_steps import Cut, packed, random_bits, uneven_cuts

TOKEN = new_token()


def _cuts() -> dict[str, Cut]:
    large = random_bits((900, 1100), "F32", 90)
    return {**uneven_cuts(), "large": Cut("F32", large, ([100, 640], []))}


def _held(slot: ByteArray, remote: RemoteMemory | None = None) -> HeldSlot:
    seal, part = seal_and_part(slot)
    return HeldSlot(seal=seal, part=part, memory=slot if remote is None else remote)


class _Nodes:
    """Keepers of several nodes, with the slots of some ranks each."""

    def __init__(self, slots: list[ByteArray], nodes: int) -> None:
        self._stack = ExitStack()
        self.remotes: list[RemoteSlots] = []
        for node in range(nodes):
            mine = [s for s in slots if seal_and_part(s)[0].rank % nodes == node]
            fake = FakeSlots({(r.rank, r.step_id): s for s in mine for r in [seal_and_part(s)[0]]})
            plane = self._stack.enter_context(DataPlane(fake.read, TOKEN, sealed_slots=fake.sealed))
            self.remotes.append(self._stack.enter_context(RemoteSlots(plane.address, TOKEN)))

    def of(self, rank: int) -> RemoteSlots:
        return self.remotes[rank % len(self.remotes)]

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def cuts() -> dict[str, Cut]:
    return _cuts()


@pytest.fixture
def slots(cuts: dict[str, Cut]) -> list[ByteArray]:
    return sealed_slots(cuts)


@pytest.fixture
def nodes(slots: list[ByteArray]) -> Iterator[_Nodes]:
    made = _Nodes(slots, 2)
    yield made
    made.close()


def _step(slots: list[ByteArray], nodes: _Nodes, where: str) -> MemoryStep:
    is_remote = {
        "here": lambda rank: False,
        "elsewhere": lambda rank: True,
        "mixed": lambda rank: rank % 2 == 1,
    }[where]
    held = [_held(s, nodes.of(n) if is_remote(n) else None) for n, s in enumerate(slots)]
    return MemoryStep(held[::-1])


@pytest.mark.parametrize("where", ["here", "elsewhere", "mixed"])
def test_all_is_read_as_it_was_saved(
    slots: list[ByteArray], nodes: _Nodes, cuts: dict[str, Cut], where: str
) -> None:
    step = _step(slots, nodes, where)
    assert step.manifest == packed(cuts)[0]
    assert step.is_here == (where == "here")
    ways = [None, False] if where == "here" else [None]
    for in_place in ways:
        with step.reader(in_place=in_place, threads=2) as reader:
            assert (reader.ranged is None) == (where == "here" and in_place is None)
            assert reader.where == "the memory of keepers (step 1)"
            for name, cut in cuts.items():
                found = reader.read(name)
                assert found.tobytes() == np.ascontiguousarray(cut.bits).tobytes(), name
            part = reader.read("large", Box((90, 7), (600, 1000)))
            expected = cuts["large"].bits[90:690, 7:1007]
            np.testing.assert_array_equal(part.view("<u4").reshape(600, 1000), expected)
            for pack in range(len(step.manifest.packs)):
                reader.verify(pack)
            with pytest.raises(CheckpointError, match="is not a local folder"):
                _ = reader.step_path


def test_what_keepers_tell_is_what_a_step_is_made_of(
    nodes: _Nodes, slots: list[ByteArray], cuts: dict[str, Cut]
) -> None:
    held = [
        HeldSlot(seal=seal, part=part, memory=remote)
        for remote in nodes.remotes
        for seal, part in remote.holdings()
    ]
    assert len(held) == len(slots)
    with MemoryStep(held).reader() as reader:
        assert reader.read("large").tobytes() == cuts["large"].bits.tobytes()


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_byte_that_changed_is_noticed_and_its_slot_is_named(
    slots: list[ByteArray], nodes: _Nodes, where: str
) -> None:
    step = _step(slots, nodes, where)
    stored = step.manifest.tensors["large"]
    rank = stored.packs[1]
    record = step.manifest.packs[rank]
    at = seal_and_part(slots[rank])[0].pack_start + record.data_start
    slots[rank][at + step.manifest.starts("large")[1] + BLOCK_BYTES] ^= 1
    named = rf"rank {rank}'s slot in the memory of keepers \(step 1"
    if where == "elsewhere":
        named += f", at {nodes.of(rank).address}"
    with step.reader() as reader:
        with pytest.raises(BlockChecksumError, match=named + r"\) is damaged: block"):
            reader.read("large")
        with pytest.raises(BlockChecksumError, match=named):
            reader.verify(rank)
        reader.read("large", Box((0, 0), (100, 1100)))  # the cell of another rank
    slots[rank][at - 1] ^= 1
    with step.reader() as reader, pytest.raises(PackHeaderError, match=named):
        reader.read("large")


def test_a_keeper_that_lets_a_slot_go_is_an_error(slots: list[ByteArray], nodes: _Nodes) -> None:
    step = _step(slots, nodes, "elsewhere")
    nodes.close()
    with step.reader() as reader, pytest.raises(KeeperError, match="no keeper can be reached"):
        reader.read("large")


def test_what_is_not_here_cannot_be_read_in_place(slots: list[ByteArray], nodes: _Nodes) -> None:
    step = _step(slots, nodes, "elsewhere")
    with (
        step.reader(in_place=True) as reader,
        pytest.raises(CheckpointError, match="is not in the memory of this process"),
    ):
        reader.read("large")


def test_memory_that_ends_too_early_is_noticed(slots: list[ByteArray]) -> None:
    held = [_held(slot) for slot in slots]
    seal = held[0].seal
    short = replace(held[0], memory=slots[0][: seal.pack_start + seal.pack_bytes - 1])
    step = MemoryStep([short, *held[1:]])
    for in_place in (True, False):
        with (
            step.reader(in_place=in_place) as reader,
            pytest.raises(PackTruncatedError, match="rank 0's slot in the memory of keepers"),
        ):
            reader.verify(0)


def test_only_a_whole_snapshot_is_one(cuts: dict[str, Cut], slots: list[ByteArray]) -> None:
    held = [_held(slot) for slot in slots]
    with pytest.raises(CheckpointError, match=r"slots of ranks \[\]: expected one of each"):
        MemoryStep([])
    for missing in (held[1:], held[:-1], [*held, held[2]]):
        with pytest.raises(CheckpointError, match=r"expected one of each of all \d+, of step 1;"):
            MemoryStep(missing)
    newer = _held(sealed_slots(cuts, step=2)[0])
    with pytest.raises(CheckpointError, match=r"different snapshots .* \(1, 1\), \(1, 2\)"):
        MemoryStep([newer, *held[1:]])
    other = replace(held[0], seal=replace(held[0].seal, owner=b"another run's id"))
    with pytest.raises(CheckpointError, match="different snapshots"):
        MemoryStep([other, *held[1:]])


def test_a_part_belongs_to_its_slot(slots: list[ByteArray]) -> None:
    held = [_held(slot) for slot in slots]

    def told(part: bytes, **changes: Any) -> MemoryStep:
        seal = replace(held[1].seal, part_crc32c=crc32c(part), **changes)
        return MemoryStep([held[0], replace(held[1], part=part, seal=seal), *held[2:]])

    with pytest.raises(ManifestChecksumError, match=r"rank 1's slot .* is damaged: its part has"):
        MemoryStep([held[0], replace(held[1], part=held[2].part), *held[2:]])
    with pytest.raises(ManifestError, match=r"rank 1's slot .* not of what its seal says"):
        told(held[2].part)
    with pytest.raises(ManifestChecksumError, match="rank 1's slot"):
        told(held[1].part[:-1])
    with pytest.raises(ManifestError, match=r"rank 1's slot .* tells of a pack of"):
        told(held[1].part, pack_bytes=held[1].seal.pack_bytes - 1)
    first, part = (decode_part(held[n].part, "p") for n in (0, 1))
    same = replace(part, pack=replace(part.pack, file=first.pack.file))
    with pytest.raises(ManifestError, match="two ranks have packs of the same name"):
        told(encode_part(same))
    raw = replace(part, fragments=(), pack=replace(part.pack, extents=(), data_bytes=0))
    with pytest.raises(ManifestError, match="raw_extents"):
        told(encode_part(raw))
    none = replace(part, fragments=(), pack=replace(part.pack, data_bytes=0))
    with pytest.raises(LayoutError):
        told(encode_part(none))
    with pytest.raises(ManifestError, match=r"rank 0's slot .* none of rank 0"):
        _without_context(held)


def _without_context(held: list[HeldSlot]) -> MemoryStep:
    part = encode_part(replace(decode_part(held[0].part, "p"), context={}))
    seal = replace(held[0].seal, part_crc32c=crc32c(part), part_bytes=len(part))
    return MemoryStep([replace(held[0], part=part, seal=seal), *held[1:]])


# Through the load path of live states


class _Counting:
    """A remote that counts what it reads of data."""

    def __init__(self, remote: RemoteSlots) -> None:
        self._remote, self.address, self.read_bytes = remote, remote.address, 0

    def read_into(self, rank: int, step_id: StepId, offset: int, destination: ByteArray) -> None:
        self.read_bytes += len(destination)
        self._remote.read_into(rank, step_id, offset, destination)


def _state(value: float) -> State:
    return State(model=nn.ParameterList([torch.full((700, 500), value + n) for n in range(6)]))


@pytest.fixture(scope="module")
def saved() -> tuple[list[ByteArray], MemoryStore]:
    """What two ranks have saved, as slots and as a checkpoint."""
    store = MemoryStore()

    def save(c: ThreadCollective) -> None:
        with Checkpointer(store, collective=c) as checkpointer:
            checkpointer.save(1, _state(1.0))

    assert run_threads(save, 2) == [None] * 2
    folder = "step-00000001-g00001"
    slots = []
    for rank in range(2):
        part = decode_part(store.read(f"{folder}/parts/{rank:05d}.json"), "part")
        slots.append(slot_of(store.read(f"{folder}/{part.pack.file}"), part))
    return slots, store


def test_the_manifest_is_the_one_that_is_committed(
    saved: tuple[list[ByteArray], MemoryStore],
) -> None:
    slots, store = saved
    with Checkpointer(store, read_only=True) as checkpointer:
        expected = checkpointer.inspect()
    assembly = Assembly()
    for _ in range(2):
        assert MemoryStep([_held(slot) for slot in slots], assembly=assembly).manifest == expected
    assert expected is not None
    assert expected.lineage is not None


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("where", ["here", "elsewhere", "mixed"])
def test_ranks_load_a_live_state_together(
    saved: tuple[list[ByteArray], MemoryStore], where: str, world_size: int
) -> None:
    slots, _ = saved
    nodes = _Nodes(slots, 2)

    def load(c: ThreadPeers) -> Any:
        # of a mixed step each rank has another slot: all must say that it is not read in place
        remotes = [_Counting(nodes.of(rank)) for rank in range(2)]
        here = {"here": {0, 1}, "mixed": {c.rank}, "elsewhere": set()}[where]
        held = [
            _held(slot, None if rank in here else remote)
            for rank, (slot, remote) in enumerate(zip(slots, remotes, strict=True))
        ]
        state = _state(0.0)
        with MemoryStep(held).reader(in_place=where == "here") as reader:
            tensors = list(tensors_of(state).values())
            done = fill_together(c, reader, lambda: tensors, lambda: None, None)
        assert done.causes == {}
        return bits(state), sum(remote.read_bytes for remote in remotes)

    try:
        results = run_threads(load, world_size, kind=ThreadPeers)
    finally:
        nodes.close()
    for found, _ in results:
        assert found == bits(_state(1.0))
    pack_bytes = sum(seal_and_part(slot)[0].pack_bytes for slot in slots)
    read_bytes = sum(read for _, read in results)
    if where == "elsewhere":  # each byte once, whoever needs it
        assert 6 * 700 * 500 * 4 <= read_bytes <= pack_bytes
    else:
        assert read_bytes <= (pack_bytes if where == "mixed" else 0)


def test_a_rank_that_cannot_read_is_named_on_all(
    saved: tuple[list[ByteArray], MemoryStore],
) -> None:
    slots = [slot.copy() for slot in saved[0]]
    seal, part = seal_and_part(slots[1])
    record = decode_part(part, "part").pack
    slots[1][seal.pack_start + record.data_start + 5] ^= 1

    def load(c: ThreadPeers) -> dict[int, str]:
        state = _state(0.0)
        with MemoryStep([_held(slot) for slot in slots]).reader() as reader:
            tensors = list(tensors_of(state).values())
            return fill_together(c, reader, lambda: tensors, lambda: None, None).causes

    causes = run_threads(load, 2, kind=ThreadPeers)
    assert causes[0] == causes[1]
    assert "rank 1's slot in the memory of keepers (step 1) is damaged: block 0" in causes[0][0]
