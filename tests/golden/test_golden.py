"""Checkpoints of every format version so far are read bit for bit, as long as everstep exists."""

from pathlib import Path

import pytest

from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.digest import digest_step
from everstep.checkpoint.layout import ITEM_BYTES
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.numbers import numbers
from everstep.checkpoint.open_place import open_place
from everstep.checkpoint.verify import verify_packs
from everstep.ckpt_survey import survey
from tests.golden.contents import OBJECTS, OLDER, TENSORS, bits_of
from tests.golden.make import make

VERSIONS = sorted(Path(__file__).parent.glob("v*"))
STATE_DIGEST = "5f0b137c6fea48245906f99117eb572c"
NEWEST, ABANDONED = StepId(2, 2), StepId(1, 3)


def test_there_is_one_of_each_version() -> None:
    assert [version.name for version in VERSIONS] == ["v1"]


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
def test_every_bit_is_read(version: Path) -> None:
    place = open_place(str(version))
    assert place.chosen() == NEWEST
    with place.open(NEWEST) as reader:
        manifest = reader.manifest
        assert dict(manifest.objects) == OBJECTS
        assert dict(manifest.mesh) == {"dp_shard": 3}
        assert {n: (t.spec.dtype, t.spec.shape) for n, t in manifest.tensors.items()} == TENSORS
        for name, (dtype, shape) in TENSORS.items():
            expected = bits_of(name, dtype, shape, NEWEST.step)
            assert reader.read(name).tobytes() == expected.tobytes(), name
        assert verify_packs(place.files(NEWEST), manifest) == []
        assert digest_step(reader).state == STATE_DIGEST
    for step_id in (StepId(1, 1), ABANDONED):
        with place.open(step_id) as reader:
            for name, (dtype, shape) in OLDER.items():
                expected = bits_of(name, dtype, shape, step_id.step)
                assert reader.read(name).tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
def test_the_lineage_is_understood(version: Path) -> None:
    directory = CheckpointDirectory(version)
    assert directory.lineage() == [StepId(1, 1), NEWEST]
    found = survey(directory)
    assert found.problem is None
    assert [(s.step_id, s.in_lineage, s.problem) for s in found.steps] == [
        (StepId(1, 1), True, None),
        (NEWEST, True, None),
        (ABANDONED, False, None),
    ]


def test_some_numbers_as_people_know_them() -> None:
    """The formula gives bits; this is what some of them mean."""
    with open_place(str(VERSIONS[0])).open(NEWEST) as reader:
        scalar = numbers("I64", reader.read("model.scalar"))
        flags = numbers("BOOL", reader.read("model.bool"))
    start = sum(b"model.scalar") + 2000
    assert scalar.tolist() == [2654435761 * start + start]
    assert set(flags.tolist()) == {0, 1}


def test_what_is_made_now_holds_the_same(tmp_path: Path) -> None:
    make(tmp_path / "now")
    now, then = (open_place(str(path)) for path in (tmp_path / "now", VERSIONS[-1]))
    assert now.chosen() == then.chosen()
    with now.open(NEWEST) as mine, then.open(NEWEST) as golden:
        assert digest_step(mine) == digest_step(golden)


def test_every_dtype_is_there() -> None:
    assert {dtype for dtype, _ in TENSORS.values()} == set(ITEM_BYTES)
