"""Verifying tells all damage of a checkpoint: packs, blocks, and the tensors that lie there."""

import errno
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from everstep.checkpoint import verify
from everstep.checkpoint.manifest import Manifest
from everstep.checkpoint.pack import BLOCK_BYTES
from everstep.checkpoint.verify import verify_packs
from tests.support.stored import saved_reader

MIB = 2**20


@dataclass
class Files:
    """The files of a step in memory; some reads fail."""

    contents: dict[str, bytearray]
    broken: set[tuple[str, int]] = field(default_factory=set)
    """Blocks, counted from the file's beginning, that cannot be read."""
    reads: int = 0

    def size(self, name: str) -> int | None:
        return len(self.contents[name]) if name in self.contents else None

    def read(self, name: str, offset: int, length: int) -> bytes:
        self.reads += 1
        for block in range(offset // BLOCK_BYTES, -(-(offset + length) // BLOCK_BYTES)):
            if (name, block) in self.broken:
                raise OSError(errno.EIO, "Input/output error")
        return bytes(self.contents[name][offset : offset + length])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, dict[str, bytes]]:
    """Two packs: a tensor of 5 MiB and a bit, cut in two; small ones at the end of the first."""
    rng = np.random.default_rng(2)
    arrays = {
        "large": rng.integers(0, 2**32, (5 * 2**18 + 7,), dtype=np.uint32),
        "small": rng.integers(0, 255, (30,), dtype=np.uint8),
        "tiny": rng.integers(0, 255, (3,), dtype=np.uint8),
    }
    root: Path = tmp_path_factory.mktemp("written")
    bounds = {"large": [(3 * 2**18,)]}
    with saved_reader(root, arrays, bounds=bounds, world_size=2) as reader:
        files = {p.file: (reader.step_path / p.file).read_bytes() for p in reader.manifest.packs}
        return reader.manifest, files


@pytest.fixture
def saved(written: tuple[Manifest, dict[str, bytes]]) -> tuple[Manifest, Files]:
    manifest, contents = written
    return manifest, Files({name: bytearray(data) for name, data in contents.items()})


def test_a_whole_checkpoint(saved: tuple[Manifest, Files]) -> None:
    manifest, files = saved
    done: list[int] = []
    assert verify_packs(files, manifest, on_bytes=done.append, threads=2) == []
    assert done == sorted(done)
    assert done[-1] == manifest.size_bytes


def test_all_damaged_blocks_are_told_with_their_tensors(
    saved: tuple[Manifest, Files], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, files = saved
    monkeypatch.setattr(verify, "RUN_BYTES", 2 * BLOCK_BYTES)
    first, second = manifest.packs
    assert first.data_bytes == 3 * MIB + 30
    for record, at in ((first, 0), (first, 3 * MIB), (second, MIB + 5), (second, 2 * MIB)):
        files.contents[record.file][record.data_start + at] ^= 0x40
    done: list[int] = []
    damages = verify_packs(files, manifest, on_bytes=done.append)
    assert [(d.file, d.block, d.tensors) for d in damages] == [
        (first.file, 0, ("large",)),
        (first.file, 3, ("small",)),
        (second.file, 1, ("large",)),
        (second.file, 2, ("large", "tiny")),
    ]
    assert all("checksum" in d.problem for d in damages)
    assert done == sorted(done)
    assert done[-1] == manifest.size_bytes


def test_packs_of_which_nothing_can_be_trusted(saved: tuple[Manifest, Files]) -> None:
    manifest, files = saved
    first, second = manifest.packs
    del files.contents[first.file]
    files.contents[second.file][9] ^= 1
    done: list[int] = []
    missing, header = verify_packs(files, manifest, on_bytes=done.append)
    assert (missing.block, missing.problem) == (None, "the file is missing")
    assert missing.tensors == ("large", "small")
    assert (header.block, header.tensors) == (None, ("large", "tiny"))
    assert "header or checksum table" in header.problem
    assert done == sorted(done)
    assert done[-1] == manifest.size_bytes
    files.contents[first.file] = bytearray(5)
    cut, _ = verify_packs(files, manifest)
    assert cut.problem == f"it has 5 bytes, expected {first.size_bytes}"


def test_blocks_that_cannot_be_read(saved: tuple[Manifest, Files]) -> None:
    manifest, files = saved
    first, _ = manifest.packs
    files.broken = {(first.file, 1)}
    done: list[int] = []
    damages = verify_packs(files, manifest, on_bytes=done.append)
    # packs are not aligned to blocks of the disk: two blocks of the pack lie in the broken one
    assert [(d.block, d.problem) for d in damages] == [
        (0, "Input/output error"),
        (1, "Input/output error"),
    ]
    assert done == sorted(done)
    assert done[-1] == manifest.size_bytes
    files.broken = {(first.file, 0)}
    (header,) = verify_packs(files, manifest)
    assert (header.block, header.problem) == (None, "Input/output error")


def test_a_file_that_shrinks_meanwhile(
    saved: tuple[Manifest, Files], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, files = saved
    whole = files.read

    def short(name: str, offset: int, length: int) -> bytes:
        data = whole(name, offset, length)
        return data[:-1] if length == BLOCK_BYTES and offset % BLOCK_BYTES else data

    monkeypatch.setattr(files, "read", short)
    monkeypatch.setattr(verify, "RUN_BYTES", BLOCK_BYTES)
    damages = verify_packs(files, manifest)
    assert {d.problem for d in damages} == {"it ends 1 bytes too early"}
    assert len(damages) == 3 + 2


def test_a_pack_without_data(tmp_path: Path) -> None:
    arrays = {"only": np.zeros(3, np.float32)}
    with saved_reader(tmp_path, arrays, world_size=2) as reader:
        files = Files(
            {
                p.file: bytearray((reader.step_path / p.file).read_bytes())
                for p in reader.manifest.packs
            }
        )
        assert verify_packs(files, reader.manifest) == []
        empty = reader.manifest.packs[1]
        assert empty.data_bytes == 0
        files.contents[empty.file][20] ^= 1
        (damage,) = verify_packs(files, reader.manifest)
        assert (damage.file, damage.block, damage.tensors) == (empty.file, None, ())
