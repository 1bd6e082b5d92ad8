"""A checkpoint in which any one byte is wrong, or any byte is missing, is refused and named.

Every position of the pack and of the manifest is tried. There is no harmless byte: header, padding
and checksum table are under the checksum in the manifest, data under the table, the manifest under
its own. Part files are not read after the commit.
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import nn

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.errors import (
    BlockChecksumError,
    DamagedError,
    LoadFailedError,
    ManifestChecksumError,
    ManifestError,
    PackHeaderError,
    PackTruncatedError,
)
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.manifest import Manifest, decode_manifest
from everstep.checkpoint.pack_reader import PackReader
from everstep.checkpoint.torch_state import State
from tests.support.checkpoints import Counter, packs

STEP = StepId(1, 7)


@dataclass
class Saved:
    root: Path
    state: State
    manifest: Manifest

    def __post_init__(self) -> None:
        self.manifest_file = CheckpointDirectory(self.root).step_path(STEP) / "manifest.json"
        (self.pack,) = packs(self.root)

    def load(self) -> None:
        with Checkpointer(self.root) as checkpointer:
            checkpointer.load(self.state)

    def verify_pack(self) -> None:
        """What a load does before it copies the first byte of any block; all blocks here."""
        with PackReader(self.pack, self.manifest.packs[0]) as reader:
            reader.verify_all()


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """A complete checkpoint, small enough to damage at every byte."""
    state = State(model=nn.Linear(2, 3), data=Counter(5))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(STEP.step, state)
        manifest = checkpointer.inspect()
    assert manifest is not None
    return Saved(tmp_path, state, manifest)


@pytest.fixture
def pack_bytes(saved: Saved) -> Iterator[mmap.mmap]:
    """The pack, to be changed in place."""
    with saved.pack.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        yield mapped


@pytest.mark.parametrize("flip", [0x01, 0xFF])
def test_every_flipped_byte_of_the_pack(saved: Saved, pack_bytes: mmap.mmap, flip: int) -> None:
    record = saved.manifest.packs[0]
    for position in range(len(pack_bytes)):
        pack_bytes[position] ^= flip
        expected = (
            BlockChecksumError
            if 0 <= position - record.data_start < record.data_bytes
            else PackHeaderError
        )
        with pytest.raises(expected) as caught:
            saved.verify_pack()
        assert caught.value.path == str(saved.pack)
        pack_bytes[position] ^= flip
    saved.verify_pack()


def test_every_length_of_the_pack(saved: Saved) -> None:
    whole = saved.pack.read_bytes()
    with saved.pack.open("r+b") as file:
        for length in range(len(whole) - 1, -1, -1):
            file.truncate(length)
            with pytest.raises(PackTruncatedError, match=f"has {length} bytes"):
                saved.verify_pack()
    for longer in (whole + b"\0", whole + whole):
        saved.pack.write_bytes(longer)
        with pytest.raises(PackTruncatedError):
            saved.verify_pack()


@pytest.mark.parametrize("flip", [0x01, 0xFF])
def test_every_flipped_byte_of_the_manifest(saved: Saved, flip: int) -> None:
    data = bytearray(saved.manifest_file.read_bytes())
    for position in range(len(data)):
        data[position] ^= flip
        with pytest.raises(ManifestChecksumError):
            decode_manifest(bytes(data), "m")
        data[position] ^= flip
    assert decode_manifest(bytes(data), "m") == saved.manifest


def test_every_length_of_the_manifest(saved: Saved) -> None:
    data = saved.manifest_file.read_bytes()
    for length in range(len(data)):
        with pytest.raises(ManifestChecksumError):
            decode_manifest(data[:length], "m")
    with pytest.raises(ManifestError):
        decode_manifest(data + b" ", "m")


@pytest.mark.parametrize("name", ["pack", "manifest_file"])
def test_a_load_names_the_file_wherever_it_is_damaged(saved: Saved, name: str) -> None:
    path: Path = getattr(saved, name)
    whole = path.read_bytes()
    for position in [*range(0, len(whole), len(whole) // 40), len(whole) - 1]:
        for damaged in (
            whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :],
            whole[:position],
        ):
            path.write_bytes(damaged)
            with pytest.raises(LoadFailedError, match=path.name) as caught:
                saved.load()
            assert isinstance(caught.value.__cause__, DamagedError)
            assert list(caught.value.causes) == [0]
    path.write_bytes(whole)
    saved.load()


def test_parts_are_not_read_after_the_commit(saved: Saved) -> None:
    (part,) = saved.pack.parent.glob("parts/*")
    part.write_bytes(b"anything")
    saved.load()
    part.unlink()
    saved.load()


def test_another_file_in_its_place(saved: Saved) -> None:
    saved.pack.unlink()
    saved.pack.mkdir()
    with pytest.raises(LoadFailedError, match=saved.pack.name):
        saved.load()
