"""Reading from an object store: the same bytes as from a file, each once, in bounded memory."""

import threading
from pathlib import Path

import numpy as np
import pytest

from everstep.checkpoint.errors import BlockChecksumError, PackHeaderError, PackTruncatedError
from everstep.checkpoint.layout import Box, Fragment, TensorSpec
from everstep.checkpoint.manifest import Manifest, Part, build_manifest
from everstep.checkpoint.pack import (
    BLOCK_BYTES,
    StridedBytes,
    dense_strides,
    plan_pack,
    stream_pack,
)
from everstep.checkpoint.ranged_read import AT_ONCE, RangedReader, Request
from everstep.checkpoint.step_reader import StepReader
from everstep.checkpoint.store import Folder
from everstep.checkpoint.store_local import LocalStore
from everstep.checkpoint.store_memory import MemoryStore

SPECS = [
    TensorSpec("large", "F32", (3000, 1100)),
    TensorSpec("small", "F32", (3,)),
    TensorSpec("tall", "U8", (5_000_000, 2)),
    TensorSpec("wide", "I16", (2, 1_500_000)),
    TensorSpec("zero", "F64", ()),
]


class _Counting(MemoryStore):
    """Remembers what was read, and how much at once."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[int, int]] = []
        self.running = self.most = 0
        self.guard = threading.Lock()

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        with self.guard:
            self.running += 1
            self.most = max(self.most, self.running)
            self.reads.append((offset, length or 0))
        try:
            return super().read(key, offset, length)
        finally:
            with self.guard:
                self.running -= 1


Saved = tuple[_Counting, Path, Manifest, dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The same step of two packs in memory and in a folder."""
    root, store = tmp_path_factory.mktemp("ranged"), _Counting()
    rng = np.random.default_rng(0)
    arrays = {
        s.name: rng.integers(0, 256, s.size_bytes, np.uint8).reshape(*s.shape, s.item_bytes)
        for s in SPECS
    }
    held: list[list[Fragment]] = [[], []]
    for spec in SPECS:
        if not spec.shape or spec.shape[0] < 2:
            held[0].append(Fragment(spec, spec.whole))
            continue
        cut = spec.shape[0] // 3 + 1
        rest = spec.shape[1:]
        zeros = (0,) * len(rest)
        held[0].append(Fragment(spec, Box((0, *zeros), (cut, *rest))))
        held[1].append(Fragment(spec, Box((cut, *zeros), (spec.shape[0] - cut, *rest))))
    parts = []
    for rank, fragments in enumerate(held):
        plan = plan_pack(rank, fragments)

        def source_of(f: Fragment) -> StridedBytes:
            strides = dense_strides(f.spec.shape, f.spec.item_bytes)
            at = sum(o * s for o, s in zip(f.box.offset, strides, strict=True))
            return StridedBytes(arrays[f.spec.name].reshape(-1), at, strides)

        for place in (store, LocalStore(root)):
            with place.writer(f"step/p{rank}", plan.size_bytes) as out:
                record = stream_pack(out, f"p{rank}", plan, source_of)
        context = {"mesh": {}, "producer": {}, "objects": {}} if rank == 0 else {}
        parts.append(
            Part(
                generation=1, step=1, rank=rank, world_size=2, pack=record,
                fragments=plan.fragments, context=context,
            )
        )  # fmt: skip
    return store, root / "step", build_manifest(parts), arrays


def _reader(saved: Saved) -> RangedReader:
    return RangedReader(Folder(saved[0], "step"), saved[2])


def test_everything_is_read_once_in_pieces(saved: Saved) -> None:
    store, _, manifest, arrays = saved
    reader = _reader(saved)
    targets = {s.name: np.zeros(s.size_bytes, np.uint8) for s in SPECS}
    seen: list[int] = []
    store.reads.clear()
    reader.fill(
        [
            Request(
                s.name,
                s.whole,
                StridedBytes(targets[s.name], 0, dense_strides(s.shape, s.item_bytes)),
            )
            for s in SPECS
        ],
        seen.append,
    )  # fmt: skip
    for name, array in arrays.items():
        np.testing.assert_array_equal(targets[name], array.reshape(-1))
    assert sum(length for _, length in store.reads) == manifest.size_bytes
    assert max(length for _, length in store.reads) <= 4 * BLOCK_BYTES
    assert store.most <= AT_ONCE
    assert seen == sorted(seen)
    assert seen[-1] == sum(s.size_bytes for s in SPECS)


@pytest.mark.parametrize(
    ("name", "box"),
    [
        ("large", Box((10, 7), (2500, 3))),
        ("large", Box((999, 0), (2, 1100))),
        ("tall", Box((4_999_999, 1), (1, 1))),
        ("wide", Box((0, 700_000), (2, 800_000))),
        ("small", Box((1,), (2,))),
        ("zero", Box((), ())),
        ("small", Box((1,), (0,))),
    ],
)
def test_a_box_is_what_the_mapped_reader_finds(saved: Saved, name: str, box: Box) -> None:
    store, folder, manifest, _ = saved
    with (
        StepReader(folder, manifest) as mapped,
        StepReader(Folder(store, "step"), manifest) as ranged,
    ):
        np.testing.assert_array_equal(mapped.read(name, box), ranged.read(name, box))


def test_few_bytes_are_read_for_a_small_box(saved: Saved) -> None:
    store = saved[0]
    reader = _reader(saved)
    reader.open_packs([0, 1])
    store.reads.clear()
    data = np.zeros(8, np.uint8)
    reader.fill([Request("small", Box((0,), (2,)), StridedBytes(data, 0, (4,)))])
    assert [length for _, length in store.reads] == [BLOCK_BYTES]


@pytest.mark.parametrize("pack", [0, 1])
def test_every_pack_is_verified(saved: Saved, pack: int) -> None:
    _reader(saved).verify(pack)


def _damaged(saved: Saved, pack: str, change: int | None, at: int = 0) -> RangedReader:
    """A reader of a copy whose pack is flipped at a byte, or cut by one."""
    store, copy = saved[0], MemoryStore()
    for name in ("p0", "p1"):
        data = bytearray(store.read(f"step/{name}"))
        if name == pack and change is None:
            del data[-1]
        elif name == pack and change is not None:
            data[at] ^= change
        copy.put(f"step/{name}", bytes(data))
    return RangedReader(Folder(copy, "step"), saved[2])


def test_damage_counts_where_it_is_needed(saved: Saved) -> None:
    record = saved[2].packs[0]
    reader = _damaged(saved, "p0", 1, record.data_start + 2 * BLOCK_BYTES + 5)
    data = np.zeros(8, np.uint8)
    reader.fill([Request("small", Box((0,), (2,)), StridedBytes(data, 0, (4,)))])
    with pytest.raises(BlockChecksumError, match="p0 is damaged: block 2 has checksum"):
        reader.verify(0)


@pytest.mark.parametrize("where", ["header", "table"])
def test_damage_of_what_vouches_for_the_rest(saved: Saved, where: str) -> None:
    record = saved[2].packs[0]
    at = 100 if where == "header" else record.data_start + record.data_bytes
    with pytest.raises(PackHeaderError):
        _damaged(saved, "p0", 1, at).verify(0)


def test_packs_of_another_size(saved: Saved) -> None:
    with pytest.raises(PackTruncatedError, match=r"p1 is damaged: it has \d+ bytes, expected"):
        _damaged(saved, "p1", None).verify(1)
    with pytest.raises(PackTruncatedError, match="the file is missing"):
        RangedReader(Folder(MemoryStore(), "step"), saved[2]).verify(0)
