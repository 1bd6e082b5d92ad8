"""Generations, forks, and what may be resumed from."""

import math

import pytest

from everstep.checkpoint.errors import ManifestChecksumError, ManifestError
from everstep.checkpoint.lineage import (
    Generation,
    StepId,
    decode_generation,
    encode_generation,
    in_lineage,
)
from everstep.checkpoint.records import encode_record


def _generations(**forks: tuple[int, int] | None) -> dict[int, Generation]:
    """``_generations(g1=None, g2=(1, 30))``: number 2 continues number 1 from step 30."""
    return {
        int(name[1:]): Generation(
            number=int(name[1:]),
            parent=fork[0] if fork else None,
            fork_step=fork[1] if fork else None,
            created_s=0.0,
            mesh={},
        )
        for name, fork in forks.items()
    }


def _steps(generation: int, *steps: int) -> list[StepId]:
    return [StepId(generation, step) for step in steps]


def test_nothing_yet() -> None:
    assert in_lineage({}, []) == []
    assert in_lineage(_generations(g1=None), []) == []


def test_steps_of_the_parent_count_up_to_the_fork() -> None:
    generations = _generations(g1=None, g2=(1, 30))
    committed = [*_steps(1, 10, 20, 30, 40, 50), *_steps(2, 35)]
    assert in_lineage(generations, committed) == [*_steps(1, 10, 20, 30), *_steps(2, 35)]


def test_a_generation_that_has_not_saved_yet_inherits() -> None:
    generations = _generations(g1=None, g2=(1, 20))
    assert in_lineage(generations, _steps(1, 10, 20, 30)) == _steps(1, 10, 20)


def test_grandparents_count_up_to_the_earlier_of_both_forks() -> None:
    generations = _generations(g1=None, g2=(1, 50), g3=(2, 20))
    committed = [*_steps(1, 10, 20, 30), *_steps(2, 60), *_steps(3, 25)]
    assert in_lineage(generations, committed) == [*_steps(1, 10, 20), *_steps(3, 25)]


def test_of_a_step_saved_again_the_own_counts() -> None:
    generations = _generations(g1=None, g2=(1, 20))
    assert in_lineage(generations, [*_steps(1, 20), *_steps(2, 20)]) == _steps(2, 20)


def test_siblings_do_not_count() -> None:
    generations = _generations(g1=None, g2=(1, 20), g3=(1, 10))
    committed = [*_steps(1, 10, 20), *_steps(2, 30), *_steps(3, 15)]
    assert in_lineage(generations, committed) == [*_steps(1, 10), *_steps(3, 15)]
    assert in_lineage(generations, committed, tip=2) == [*_steps(1, 10, 20), *_steps(2, 30)]


def test_a_late_step_of_an_older_generation_does_not_count() -> None:
    generations = _generations(g1=None, g2=(1, 30))
    assert in_lineage(generations, _steps(1, 30, 99)) == _steps(1, 30)


def test_a_new_beginning_inherits_nothing() -> None:
    assert in_lineage(_generations(g1=None, g2=None), _steps(1, 10)) == []


def test_there_and_back() -> None:
    for generation in _generations(g1=None, g7=(3, 400)).values():
        assert decode_generation(encode_generation(generation), "g") == generation


@pytest.mark.parametrize(
    "change",
    [
        {"number": None},
        {"number": "2"},
        {"number": True},
        {"parent": 2},
        {"parent": None},
        {"parent": -1},
        {"fork_step": None},
        {"fork_step": -1},
        {"fork_step": 1.0},
        {"created_s": 10**400},
        {"created_s": None},
        {"mesh": [2]},
        {"mesh": {"dp": "2"}},
    ],
    ids=str,
)
def test_a_defect_is_a_named_error(change: dict[str, object]) -> None:
    good: dict[str, object] = {
        "number": 2,
        "parent": 1,
        "fork_step": 5,
        "created_s": 1.0,
        "mesh": {},
    }
    assert decode_generation(encode_record("everstep_generation", 1, good), "g").number == 2
    with pytest.raises(ManifestError, match=r"^dir/00002\.json is damaged"):
        decode_generation(encode_record("everstep_generation", 1, good | change), "dir/00002.json")
    for name in good:
        part = {k: v for k, v in good.items() if k != name}
        with pytest.raises(ManifestError):
            decode_generation(encode_record("everstep_generation", 1, part), "g")


def test_every_flipped_byte_is_noticed() -> None:
    data = encode_generation(_generations(g7=(3, 400))[7])
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0xFF
        with pytest.raises(ManifestChecksumError):
            decode_generation(bytes(damaged), "g")
    assert math.isclose(decode_generation(data, "g").created_s, 0.0)
