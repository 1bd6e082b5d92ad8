"""Packs of raw extents are read as packs of safetensors are, and damage to them is found."""

import json
import mmap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.errors import (
    BlockChecksumError,
    ManifestError,
    PackHeaderError,
    PackTruncatedError,
)
from everstep.checkpoint.layout import Box, Fragment
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.manifest import Manifest, decode_manifest, decode_part, encode_manifest
from everstep.checkpoint.pack import (
    BLOCK_BYTES,
    StridedBytes,
    dense_strides,
    plan_pack,
    write_pack,
)
from everstep.checkpoint.pack_reader import PackReader
from everstep.checkpoint.ranged_plan import Window
from everstep.checkpoint.ranged_read import Request
from everstep.checkpoint.records import encode_record
from everstep.checkpoint.step_reader import StepReader
from everstep.checkpoint.store import Folder
from everstep.checkpoint.store_memory import MemoryStore
from everstep.checkpoint.torch_state import State
from everstep.checkpoint.verify import verify_index, verify_packs
from everstep.checkpoint.views.ocdbt import ocdbt_files
from tests.support.checkpoints import (
    Counter,
    ThreadPeers,
    bits,
    fresh_state,
    run_threads,
    tiny_state,
)
from tests.support.format_reader import read_checkpoint
from tests.support.raw_extents import raw_pack
from tests.support.view_programs import function
from tests.support.written_steps import Cut, packed, random_bits, uneven_cuts, write_step

open_tensor = function("TensorStore", "open_tensor")
SMALL = {
    "a": Cut("F32", random_bits((3, 2), "F32", 1), ([2], [])),
    "b": Cut("U8", random_bits((5,), "U8", 2)),
    "c": Cut("BF16", random_bits((7,), "BF16", 3), flat=(3,)),
}
LARGE = {
    "large": Cut("F32", random_bits((5, 300_000), "F32", 4), ([3], [])),  # of 4 and 3 blocks
    "tiny": Cut("U8", random_bits((30,), "U8", 5), ([9],)),
}


def _in_memory(step: Path, manifest: Manifest) -> tuple[StepReader, MemoryStore]:
    store = MemoryStore()
    for path in step.iterdir():
        if path.is_file():
            with store.writer(f"s/{path.name}", path.stat().st_size) as out:
                out.append(path.read_bytes())
                out.finish()
    return StepReader(Folder(store, "s"), manifest), store


def _members(manifest: Manifest) -> dict[str, Any]:
    members: dict[str, Any] = json.loads(encode_manifest(manifest))
    del members["crc32c"], members["everstep_manifest"]
    return members


def _decode(members: dict[str, Any]) -> Manifest:
    return decode_manifest(encode_record("everstep_manifest", 1, members), "m")


@pytest.mark.parametrize("raw", [(0, 1), (1,)])
def test_both_readers_read_all_and_parts(tmp_path: Path, raw: tuple[int, ...]) -> None:
    step, manifest = write_step(tmp_path, LARGE, raw=raw)
    kinds = ["raw_extents" if n in raw else "safetensors" for n in range(2)]
    assert [p.kind for p in manifest.packs] == kinds
    array = LARGE["large"].bits
    box = Box((1, 299_000), (3, 700))
    with StepReader(step, manifest) as mapped, _in_memory(step, manifest)[0] as ranged:
        for reader in (mapped, ranged):
            for name, cut in LARGE.items():
                assert reader.read(name).tobytes() == cut.bits.tobytes()
            assert reader.read("large", box).tobytes() == array[1:4, 299_000:299_700].tobytes()
            for pack in range(2):
                reader.verify(pack)


def test_windows_over_several_extents(tmp_path: Path) -> None:
    """Blocks 0 to 6, 7 to 9, and one each: windows of 4 blocks have parts of several extents."""
    cuts = {
        "big": Cut("F32", random_bits((3, 600_000), "F32", 1)),
        "mid": Cut("I16", random_bits((2, 700_000), "I16", 2)),
        "one": Cut("U8", random_bits((9,), "U8", 3)),
        "two": Cut("U8", random_bits((7,), "U8", 4)),
    }
    step, manifest = write_step(tmp_path, cuts, raw=(0,))
    assert manifest.packs[0].blocks.n_blocks == 12
    with _in_memory(step, manifest)[0] as reader:
        for name, cut in cuts.items():
            assert reader.read(name).tobytes() == cut.bits.tobytes()
        for begin, n in ((0, 600_000), (448_570, 12), (1, 550_000)):
            box, expected = Box((0, begin), (3, min(n, 600_000 - begin))), cuts["big"].bits
            found = reader.read("big", box).tobytes()
            assert found == expected[:, begin : begin + n].tobytes()
        targets = [np.zeros(9, np.uint8), np.zeros(7, np.uint8), np.zeros(14, np.uint8)]
        boxes = {"one": Box((0,), (9,)), "two": Box((0,), (7,)), "mid": Box((1, 699_993), (1, 7))}
        reader.fill_all(
            [
                Request(name, box, StridedBytes(target, 0, (14, 2) if name == "mid" else (1,)))
                for (name, box), target in zip(boxes.items(), targets, strict=True)
            ]
        )
    expected_bits = [cuts["one"].bits, cuts["two"].bits, cuts["mid"].bits[1, 699_993:]]
    assert [t.tobytes() for t in targets] == [b.tobytes() for b in expected_bits]
    with _in_memory(step, manifest)[0] as reader:
        assert reader.ranged is not None
        for begin in range(12):
            for end in range(begin + 1, 13):
                window = Window(0, begin, end)
                assert len(reader.ranged.fetch(window)) == reader.ranged.window_bytes(window)


def test_every_kind_of_layout_and_type(tmp_path: Path) -> None:
    cuts = uneven_cuts()
    step, manifest = write_step(tmp_path, cuts, raw=range(0, 99, 2))
    with StepReader(step, manifest) as reader:
        for name, cut in cuts.items():
            assert reader.read(name).tobytes() == cut.bits.tobytes()
    assert decode_manifest(encode_manifest(manifest), "m") == manifest
    for number, index in enumerate(manifest.pack_indexes):
        for (name, offset), (start, fragment) in index.starts.items():
            stored = manifest.tensors[name]
            boxes = zip(stored.packs, stored.layout.cells(), strict=True)
            cell = [(p, b.offset) for p, b in boxes].index((number, offset))
            assert manifest.starts(name)[cell] == start
            at = manifest.file_offsets(name).tolist()[cell]
            assert manifest.packs[number].blocks.file_offset(start) == at
            if manifest.packs[number].extents is not None:
                assert (at, fragment.size_bytes) in manifest.packs[number].extents


def test_only_the_blocks_that_are_touched_are_verified(tmp_path: Path) -> None:
    step, manifest = write_step(tmp_path, LARGE, raw=(0, 1))
    pack = manifest.tensors["large"].packs[0]
    record = manifest.packs[pack]
    offset = manifest.file_offsets("large").tolist()[0]
    data = bytearray((step / record.file).read_bytes())
    data[offset + BLOCK_BYTES + 5] ^= 1
    (step / record.file).write_bytes(data)
    wanted = {Box((0, 0), (1, 1000)): True, Box((0, 262_144), (1, 9)): False}
    wanted |= {Box((1, 262_144), (1, 9)): True, Box((0, 262_140), (1, 5)): False}
    for box, is_whole in wanted.items():
        with StepReader(step, manifest) as mapped, _in_memory(step, manifest)[0] as ranged:
            for reader in (mapped, ranged):
                if is_whole:
                    reader.read("large", box)
                    continue
                with pytest.raises(BlockChecksumError) as caught:
                    reader.read("large", box)
                first = record.blocks.starts.index(manifest.starts("large")[0])
                assert first == 0
                assert caught.value.block == 1
                assert caught.value.path.endswith(record.file)
    files = Folder(_in_memory(step, manifest)[1], "s")
    (damage,) = verify_packs(files, manifest)
    assert (damage.file, damage.block, damage.tensors) == (record.file, 1, ("large",))


def test_every_flipped_byte_of_an_extent_or_its_checksums(tmp_path: Path) -> None:
    step, manifest = write_step(tmp_path, SMALL, raw=(0, 1))
    for record in manifest.packs:
        assert record.extents is not None
        held = {at for offset, n in record.extents for at in range(offset, offset + n)}
        assert len(held) == record.data_bytes < record.size_bytes
        path = step / record.file
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
            for at in range(len(mapped)):
                mapped[at] ^= 0x10
                with PackReader(path, record) as reader:
                    if at in held:
                        with pytest.raises(BlockChecksumError):
                            reader.verify_all()
                    else:
                        reader.verify_all()  # between the extents is nothing of the checkpoint
                mapped[at] ^= 0x10
        table = step / record.table_file
        whole = table.read_bytes()
        for at in range(len(whole)):
            table.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(PackHeaderError) as caught:
                PackReader(path, record)
            assert caught.value.path == str(table)
        table.write_bytes(whole)


@pytest.mark.parametrize("which", ["file", "table_file"])
def test_every_other_length(tmp_path: Path, which: str) -> None:
    step, manifest = write_step(tmp_path, SMALL, raw=(0, 1))
    record = manifest.packs[0]
    name: str = getattr(record, which)
    whole = (step / name).read_bytes()

    def refused() -> None:
        with pytest.raises(PackTruncatedError, match=name):
            PackReader(step / record.file, record)
        reader, store = _in_memory(step, manifest)
        with pytest.raises(PackTruncatedError, match=name):
            reader.verify(0)
        (damage,) = verify_packs(Folder(store, "s"), manifest)
        assert (damage.file, damage.block) == (record.file, None)
        assert ("checksums" in damage.problem) == (which == "table_file")

    for data in [*(whole[:n] for n in range(len(whole))), whole + b"\0"]:
        (step / name).write_bytes(data)
        refused()
    (step / name).unlink()
    refused()


@pytest.mark.parametrize(
    ("offsets", "problem"),
    [
        ([[0, 2, 8]], "2 values, expected 3"),
        ([[0, 4, 32]], "more than 3 values"),
        ([[2, 1, 0], [40, 1, 0], [60, 1, 0]], "16 bytes at byte 2 is not aligned to its items"),
        ([[0, 1, 0], [40, 1, 0], [15, 1, 0]], "16 bytes at byte 0 overlaps"),
        ([[0, 1, 0], [15, 1, 0], [40, 1, 0]], "8 bytes at byte 15 is not aligned"),
        ([[88, 1, 0], [0, 1, 0], [20, 1, 0]], "16 bytes at byte 88 leaves its file of 100 bytes"),
        ([[0, 1, 0], [40, 1, 0], [100, 1, 0]], "outside"),
        ([[0, 1, 0], [40, 1, 0], [-1, 1, 0]], "outside"),
        ("x", "not a list"),
        (None, "not a list"),
    ],
)
def test_extents_that_are_refused(offsets: Any, problem: str) -> None:
    manifest, _ = packed(
        {
            "a": Cut("F32", random_bits((2, 2), "F32")),
            "b": Cut("I16", random_bits((4,), "I16")),
            "c": Cut("U8", random_bits((5,), "U8")),
        },
        raw=(0,),
    )
    members = _members(manifest)
    members["packs"][0] |= {"size_bytes": 100, "offsets": [[0, 1, 0], [16, 1, 0], [24, 1, 0]]}
    assert _decode(members).packs[0].extents == ((0, 16), (16, 8), (24, 5))
    members["packs"][0]["offsets"] = offsets
    with pytest.raises(ManifestError, match=problem):
        _decode(members)


def test_names_and_sizes_that_are_refused() -> None:
    manifest, _ = packed(SMALL, raw=(0,))
    members = _members(manifest)
    for change, problem in (
        ({"kind": "extents"}, "pack kind 'extents' is not known"),
        ({"size_bytes": 0}, "empty"),
        ({"data_bytes": manifest.packs[0].data_bytes + 1}, "the tensors give pack"),
        ({"file": "../x"}, "file name"),
        ({"file": manifest.packs[1].file}, "two packs have the same file name"),
    ):
        changed = json.loads(json.dumps(members))
        changed["packs"][0] |= change
        with pytest.raises(ManifestError, match=problem):
            _decode(changed)
    members["packs"][1]["file"] = manifest.packs[0].table_file
    with pytest.raises(ManifestError, match="two packs have the same file name"):
        _decode(members)
    del members["packs"][0]["offsets"]
    with pytest.raises(ManifestError):
        _decode(members)


def test_a_part_carries_its_extents(tmp_path: Path) -> None:
    step, manifest = write_step(tmp_path, SMALL, raw=(0,))
    path = step / "parts" / "00000.json"
    part = decode_part(path.read_bytes(), path)
    assert part.pack == manifest.packs[0]
    members = json.loads(path.read_bytes())
    del members["crc32c"], members["everstep_part"]
    members["pack"]["offsets"] = [[0, 3, 0]]
    with pytest.raises(ManifestError, match="the extent of"):
        decode_part(encode_record("everstep_part", 1, members), path)


def test_the_page_is_enough_to_read_extents(tmp_path: Path) -> None:
    step, _ = write_step(tmp_path, SMALL, raw=(1,))
    _, tensors = read_checkpoint(step)
    for name, cut in SMALL.items():
        assert tensors[name].tobytes() == cut.bits.tobytes()


def test_tensorstore_reads_extents(tmp_path: Path) -> None:
    cuts = uneven_cuts()
    manifest, packs = packed(cuts, raw=range(1, 99, 2))
    for name, data in (packs | dict(ocdbt_files(manifest))).items():
        (tmp_path / name).write_bytes(data)
    for name in ("rows", "cube", "scalar", "empty", "types.F8_E4M3", "flat rows"):
        found = open_tensor(f"{tmp_path.as_uri()}/", name).read().result()
        assert found.tobytes() == cuts[name].bits.tobytes()


def _mixed_run(root: Path, state: State) -> None:
    """Save a state, and again as a safetensors pack with its model and an extents file."""
    with Checkpointer(root / "one") as checkpointer:
        checkpointer.save(7, state)
    saved, mixed, step_id = CheckpointDirectory(root / "one"), root / "two", StepId(1, 7)
    source, directory = saved.manifest(step_id), CheckpointDirectory(mixed)
    directory.create_generation(None, dict(source.mesh))
    step, path = directory.begin_step(step_id), saved.step_path(step_id) / "parts" / "00000.json"
    part = decode_part(path.read_bytes(), path)
    held: list[list[Fragment]] = [[], []]
    for fragment in part.fragments:
        held[fragment.spec.name.startswith("optimizer.")].append(fragment)
    with StepReader(saved.step_path(step_id), source) as reader:

        def source_of(f: Fragment) -> StridedBytes:
            strides = dense_strides(f.box.shape, f.spec.item_bytes)
            return StridedBytes(reader.read(f.spec.name, f.box), 0, strides)

        record, files = raw_pack(1, held[1], lambda f: source_of(f).buffer.tobytes())
        for name, data in files.items():
            (step / name).write_bytes(data)
        records = [write_pack(step / "p0.safetensors", plan_pack(0, held[0]), source_of), record]
    for rank, context in enumerate([part.context, {}]):
        directory.put_part(
            replace(
                part, rank=rank, world_size=2, pack=records[rank], fragments=tuple(held[rank]),
                context=context,
            )
        )  # fmt: skip
    directory.commit(step_id, 2)
    assert [p.kind for p in directory.manifest(step_id).packs] == ["safetensors", "raw_extents"]
    assert verify_index(Folder(directory.store, step.name), directory.manifest(step_id)) == []


def test_a_run_loads_its_optimizer_from_extents(tmp_path: Path) -> None:
    state = tiny_state(data=Counter(5))
    _mixed_run(tmp_path, state)
    found = fresh_state(data=Counter())
    with Checkpointer(tmp_path / "two") as checkpointer:
        checkpointer.load(found)
    assert bits(found) == bits(state)
    assert found.objects["data"].value == 5


def test_several_ranks_load_extents_from_an_object_store_together(tmp_path: Path) -> None:
    state = tiny_state(data=Counter(5))
    _mixed_run(tmp_path, state)
    store = MemoryStore()
    for path in (tmp_path / "two").rglob("*"):
        if path.is_file() and path.name != "lock":
            key = path.relative_to(tmp_path / "two").as_posix()
            with store.writer(key, path.stat().st_size) as out:
                out.append(path.read_bytes())
                out.finish()
    states = [fresh_state(data=Counter()) for _ in range(2)]

    def load(c: ThreadPeers) -> None:
        with Checkpointer(store, collective=c) as checkpointer:
            checkpointer.load(states[c.rank])

    assert run_threads(load, 2, kind=ThreadPeers) == [None, None]
    for found in states:
        assert bits(found) == bits(state)
