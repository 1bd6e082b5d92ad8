"""Walks over packs: whatever is copied, touched blocks are checksummed once and nothing else is."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.checkpoint import kernels, kernels_reference
from everstep.checkpoint.errors import BlockChecksumError
from everstep.checkpoint.extents import Extents
from everstep.checkpoint.kernels import crc32c
from everstep.checkpoint.pack import TABLE_SUFFIX, PackRecord, StridedBytes, dense_strides
from everstep.checkpoint.pack_reader import PackReader
from everstep.checkpoint.pack_walk import (
    PackCopy,
    Step,
    plan_checks,
    plan_steps,
    plan_windows,
    split_copy,
)

BLOCK = 8
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def _layout(data: st.DataObject, lengths: list[int]) -> Extents:
    """Extents in any order in the file, with holes."""
    order = data.draw(st.permutations(range(len(lengths))))
    offsets, at = [0] * len(lengths), data.draw(st.integers(0, 9))
    for number in order:
        offsets[number] = at
        at += lengths[number] + data.draw(st.integers(0, 9))
    return Extents(list(zip(offsets, lengths, strict=True)), BLOCK)


def _copies(data: st.DataObject, blocks: Extents, lengths: list[int]) -> list[PackCopy]:
    """Boxes of random cells in random extents, ascending; they may overlap."""
    found = []
    for _ in range(data.draw(st.integers(0, 6))):
        number = data.draw(st.integers(0, len(lengths) - 1))
        columns = data.draw(st.integers(1, lengths[number]))
        rows = data.draw(st.integers(1, lengths[number] // columns))
        start = data.draw(st.integers(0, lengths[number] - rows * columns))
        width = data.draw(st.integers(1, columns))
        left = data.draw(st.integers(0, columns - width))
        height = data.draw(st.integers(1, rows))
        begin = blocks.starts[number] + start + left
        shape = (height, width)
        buffer = np.zeros(height * width, np.uint8)
        strides = data.draw(st.sampled_from([(width, 1), (1, height)]))
        target = StridedBytes(buffer, 0, strides)
        end = begin + (height - 1) * columns + width
        found.append(PackCopy(begin, end, (columns, 1), shape, 1, target, 0))
    return sorted(found, key=lambda copy: copy.begin)


def _checked(steps: list[Step]) -> list[int]:
    return [address for step in steps for address in range(step.begin, step.end)]


def _bytes_of_blocks(blocks: Extents, numbers: set[int]) -> list[int]:
    return [a for n in sorted(numbers) for a in range(n * BLOCK, blocks.block_end(n))]


@given(LENGTHS, st.data())
@settings(max_examples=300, deadline=None)
def test_each_touched_block_is_checksummed_once_and_in_order(
    lengths: list[int], data: st.DataObject
) -> None:
    blocks = _layout(data, lengths)
    copies = _copies(data, blocks, lengths)
    steps = list(plan_steps(copies, blocks, bytearray(blocks.n_blocks)))
    touched = {a // BLOCK for copy in copies for a in range(copy.begin, copy.end)}
    assert _checked(steps) == _bytes_of_blocks(blocks, touched)
    assert [step.copy for step in steps if step.copy is not None] == copies
    for step in steps:  # what a step checksums has not been copied before
        assert step.copy is None or step.begin == step.end or step.copy.end >= step.end


@given(LENGTHS, st.data())
@settings(max_examples=200, deadline=None)
def test_verified_blocks_are_left_out_or_checksummed_whole(
    lengths: list[int], data: st.DataObject
) -> None:
    blocks = _layout(data, lengths)
    copies = _copies(data, blocks, lengths)
    verified = bytearray(data.draw(st.booleans()) for _ in range(blocks.n_blocks))
    steps = list(plan_steps(copies, blocks, verified))
    touched = {a // BLOCK for copy in copies for a in range(copy.begin, copy.end)}
    checked = _checked(steps)
    numbers = {a // BLOCK for a in checked}
    assert checked == _bytes_of_blocks(blocks, numbers)
    assert {n for n in touched if not verified[n]} <= numbers <= touched
    assert [step.copy for step in steps if step.copy is not None] == copies
    missing = {n for n in range(blocks.n_blocks) if not verified[n]}
    assert _checked(list(plan_checks(blocks, verified))) == _bytes_of_blocks(blocks, missing)


@given(LENGTHS, st.integers(1, 60), st.data())
@settings(max_examples=200, deadline=None)
def test_windows_hold_what_their_steps_read(
    lengths: list[int], limit: int, data: st.DataObject
) -> None:
    blocks = _layout(data, lengths)
    copies = _copies(data, blocks, lengths)
    steps = list(plan_steps(copies, blocks, bytearray(blocks.n_blocks)))
    windows = plan_windows(steps, blocks, limit)
    assert [step for window in windows for step in window.steps] == steps
    for window in windows:
        assert window.end - window.begin <= limit or len(window.steps) == 1
        read = set()
        for begin, end, copy in window.steps:
            read |= {blocks.file_offset(a) for a in range(begin, end)}
            if copy is not None:
                read |= {blocks.file_offset(a) for a in range(copy.begin, copy.end)}
        assert read == set(range(window.begin, window.end))


@given(st.lists(st.integers(1, 5), max_size=4), st.integers(1, 40), st.data())
@settings(max_examples=200, deadline=None)
def test_parts_of_a_copy_are_the_copy(shape: list[int], limit: int, data: st.DataObject) -> None:
    cell = tuple(n + data.draw(st.integers(0, 2)) for n in shape)
    item_bytes = data.draw(st.sampled_from([1, 3]))
    strides, into = dense_strides(cell, item_bytes), dense_strides(shape, item_bytes)
    end = 5 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + item_bytes
    source = np.random.default_rng(0).integers(0, 256, end, np.uint8)
    whole, parted = (np.zeros(int(np.prod(shape)) * item_bytes, np.uint8) for _ in range(2))
    copy = PackCopy(5, end, strides, tuple(shape), item_bytes, StridedBytes(parted, 0, into), 0)
    kernels_reference.copy_box(whole, 0, into, source, 5, strides, shape, item_bytes)
    parts = list(split_copy(copy, limit))
    assert sum(part.n_bytes for part in parts) == whole.size
    for begin, stop, part_strides, part_shape, _, target, target_bytes in parts:
        last = sum((n - 1) * s for n, s in zip(part_shape, part_strides, strict=True))
        assert stop == begin + last + item_bytes
        assert stop - begin <= max(limit, item_bytes)
        kernels.copy_box(
            target.buffer, target_bytes, into, source, begin, part_strides, part_shape, item_bytes
        )
    np.testing.assert_array_equal(parted, whole)


def _write(folder: Path, blocks: Extents, extents: list[tuple[int, int]], raw: bytes) -> PackRecord:
    """A pack of raw extents, in blocks of ``BLOCK`` bytes."""
    (folder / "p").write_bytes(raw)
    spans = blocks.spans(0, blocks.n_blocks)
    crcs = [
        crc32c(raw[span.offset + i : span.offset + min(i + BLOCK, span.n_bytes)])
        for span in spans
        for i in range(0, span.n_bytes, BLOCK)
    ]
    table = np.array(crcs, "<u4").tobytes()
    (folder / f"p{TABLE_SUFFIX}").write_bytes(table)
    return PackRecord(
        file="p", rank=0, size_bytes=len(raw), data_start=0, data_bytes=sum(n for _, n in extents),
        crc32c=crc32c(table), extents=tuple(extents),
    )  # fmt: skip


@given(LENGTHS, st.data())
@settings(max_examples=150, deadline=None)
def test_a_reader_copies_what_is_there_and_finds_damage_in_touched_blocks_only(
    lengths: list[int], data: st.DataObject
) -> None:
    blocks = _layout(data, lengths)
    offsets = [blocks.file_offset(start) for start in blocks.starts]
    extents = list(zip(offsets, lengths, strict=True))
    size = max(offset + n for offset, n in extents) + data.draw(st.integers(0, 5))
    raw = bytearray(np.random.default_rng(1).integers(0, 256, size, np.uint8).tobytes())
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr("everstep.checkpoint.pack.BLOCK_BYTES", BLOCK)
        folder = Path(name)
        record = _write(folder, blocks, extents, bytes(raw))
        damaged = data.draw(st.none() | st.integers(0, size - 1))
        if damaged is not None:
            raw[damaged] ^= 0x40
            (folder / "p").write_bytes(raw)
        stored = np.frombuffer(bytes(raw), np.uint8)
        with PackReader(folder / "p", record, threads=data.draw(st.integers(1, 2))) as reader:
            for _ in range(3):  # what an earlier call has verified is only copied
                copies = _copies(data, blocks, lengths)
                numbers = {a // BLOCK for c in copies for a in range(c.begin, c.end)}
                touched = {blocks.file_offset(a) for a in _bytes_of_blocks(blocks, numbers)}
                told: list[int] = []
                if damaged in touched:
                    with pytest.raises(BlockChecksumError):
                        reader.read(copies, told.append)
                    continue
                reader.read(data.draw(st.permutations(copies)), told.append)
                assert sum(told) == sum(copy.n_bytes for copy in copies)
                for copy in copies:
                    expected = np.zeros_like(copy.target.buffer)
                    kernels_reference.copy_box(
                        expected, 0, copy.target.strides_bytes, stored,
                        blocks.file_offset(copy.begin), copy.strides_bytes, copy.shape, 1,
                    )  # fmt: skip
                    np.testing.assert_array_equal(copy.target.buffer, expected)
