"""However tensors are cut and extents lie, they are read as saved; any manifest is bounded."""

import json
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.checkpoint.errors import ManifestError
from everstep.checkpoint.extents import Extents, check_extents
from everstep.checkpoint.layout import ITEM_BYTES, Box
from everstep.checkpoint.manifest import decode_manifest, encode_manifest
from everstep.checkpoint.ranged_read import RangedReader
from everstep.checkpoint.records import encode_record
from everstep.checkpoint.step_reader import StepReader
from everstep.checkpoint.store import Folder
from everstep.checkpoint.store_local import LocalStore
from tests.support.format_reader import DTYPES, read_checkpoint
from tests.support.written_steps import Cut, packed, random_bits, torch_chunks

SIZES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=5)


@given(SIZES, st.integers(2, 9))
@settings(max_examples=60, deadline=None)
def test_blocks_against_a_slow_reference(placed: list[tuple[int, int]], block_bytes: int) -> None:
    """Each byte of each extent has an address of its own, and blocks hold bytes of one extent."""
    extents, expected, block = Extents(placed, block_bytes), {}, 0
    for offset, n_bytes in placed:
        for i in range(n_bytes):
            expected[block * block_bytes + i] = offset + i
        block += -(-n_bytes // block_bytes)
    assert extents.n_blocks == block
    assert extents.end == max(expected, default=-1) + 1
    assert {a: extents.file_offset(a) for a in expected} == expected
    for first in range(block + 1):
        for stop in range(first, block + 1):
            found = {
                span.block * block_bytes + i: span.offset + i
                for span in extents.spans(first, stop)
                for i in range(span.n_bytes)
            }
            inside = range(first * block_bytes, stop * block_bytes)
            assert found == {a: at for a, at in expected.items() if a in inside}


@given(SIZES, st.integers(0, 50), st.data())
@settings(deadline=None)
def test_what_is_refused_against_a_slow_reference(
    placed: list[tuple[int, int]], file_bytes: int, data: st.DataObject
) -> None:
    items = [data.draw(st.sampled_from([1, 2, 4])) for _ in placed]
    held = [at for offset, n in placed for at in range(offset, offset + n)]
    is_right = len(set(held)) == len(held) and all(at < file_bytes for at in held)
    is_right &= all(offset % k == 0 for (offset, _), k in zip(placed, items, strict=True))
    try:
        check_extents(placed, items, file_bytes)
    except ValueError:
        assert not is_right
    else:
        assert is_right


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    """A tensor cut as ``torch.chunk`` does, or as ranges."""
    dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
    shape = draw(st.lists(st.integers(0, 9), max_size=3))
    bits = random_bits(shape, dtype, draw(st.integers(0, 99)))
    if draw(st.booleans()):
        edges = draw(st.sets(st.integers(1, 40), max_size=4))
        return Cut(dtype, bits, flat=sorted(at for at in edges if at < bits.size))
    return Cut(dtype, bits, [torch_chunks(n, draw(st.integers(1, 4))) if n else [] for n in shape])


@given(
    st.dictionaries(st.sampled_from("abcdef"), cuts(), min_size=1, max_size=4),
    st.sets(st.integers(0, 9)),
    st.data(),
)
@settings(max_examples=40, deadline=None)
def test_extents_are_read_as_saved(
    states: dict[str, Cut], raw: set[int], data: st.DataObject
) -> None:
    manifest, files = packed(states, data.draw(st.integers(0, 99)), raw=raw)
    record = encode_manifest(manifest)
    assert decode_manifest(record, "m") == manifest
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "step"
        folder.mkdir()
        for name, content in (files | {"manifest.json": record}).items():
            (folder / name).write_bytes(content)
        if all(cut.dtype in DTYPES for cut in states.values()):
            _, tensors = read_checkpoint(folder)
            assert all(tensors[n].tobytes() == cut.bits.tobytes() for n, cut in states.items())
        with StepReader(folder, manifest) as mapped:
            for name, cut in states.items():
                shape = cut.bits.shape
                begin = [data.draw(st.integers(0, n)) for n in shape]
                size = [data.draw(st.integers(0, n - b)) for n, b in zip(shape, begin, strict=True)]
                index = tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))
                box = Box(tuple(begin), tuple(size))
                expected = np.array(cut.bits[index], order="C").tobytes()
                assert mapped.read(name, box).tobytes() == expected
                assert mapped.read(name).tobytes() == cut.bits.tobytes()
        ranged = RangedReader(Folder(LocalStore(Path(root)), "step"), manifest)
        for pack in range(len(manifest.packs)):
            ranged.verify(pack)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_whatever_a_manifest_says_of_extents_is_bounded(data: st.DataObject) -> None:
    manifest, _ = packed({"t": Cut("I16", random_bits((6, 5), "I16"), ([2, 4], []))}, raw=range(3))
    members = json.loads(encode_manifest(manifest))
    del members["crc32c"], members["everstep_manifest"]
    number = st.sampled_from([-(2**63), -1, 0, 1, 2, 20, 2**31, 2**59, 2**60, 2**64, 2**400])
    coded = members["packs"][data.draw(st.integers(0, 2))]
    for name in data.draw(st.sets(st.sampled_from(["size_bytes", "data_bytes", "offsets"]))):
        runs = st.lists(st.lists(number, min_size=3, max_size=3), max_size=3)
        coded[name] = data.draw(number | runs)
    if data.draw(st.booleans()):
        members["tensors"]["t"]["shape"] = data.draw(st.lists(number, max_size=3))
    record = encode_record("everstep_manifest", 1, members)
    tracemalloc.start()
    try:
        found = decode_manifest(record, "f")
    except ManifestError:
        pass
    else:
        for pack in found.packs:
            assert pack.extents is not None
            check_extents(pack.extents, [2] * len(pack.extents), pack.size_bytes)
    finally:
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak_bytes < 2**20
