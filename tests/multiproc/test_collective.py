"""The collective over real processes: payloads of any length, ranks that are out of step."""

from typing import Any

import pytest

from everstep.checkpoint import torch_collective
from everstep.checkpoint.errors import CollectiveError
from everstep.checkpoint.torch_collective import ProcessGroupCollective
from tests.support.spawn import run_ranks

EDGE = torch_collective._HEAD_BYTES - torch_collective._HEAD.size
LENGTHS = [(0, 0, 0), (5, 0, 17), (EDGE, 1, 0), (EDGE + 1, 1, 0), (0, 100_000, EDGE)]


def _payload(rank: int, length: int) -> bytes:
    return bytes((rank + 7 * i) % 251 for i in range(length))


def _exchange(rank: int, world_size: int, _: Any) -> list[list[bytes]]:
    collective = ProcessGroupCollective()
    return [
        collective.exchange(f"turn {turn}", _payload(rank, lengths[rank]))
        for turn, lengths in enumerate(LENGTHS)
    ]


def test_every_rank_gets_every_payload_whole() -> None:
    expected = [[_payload(rank, n) for rank, n in enumerate(lengths)] for lengths in LENGTHS]
    for found in run_ranks(_exchange, 3, None):
        assert found == expected


def _out_of_step(rank: int, world_size: int, _: Any) -> str:
    with pytest.raises(CollectiveError) as caught:
        ProcessGroupCollective().exchange(f"at {rank}", bytes(rank * 5000))
    return str(caught.value)


def test_ranks_at_different_places_are_told_so() -> None:
    assert run_ranks(_out_of_step, 2, None) == [
        "ranks are out of step: this one is at 'at 0'",
        "ranks are out of step: this one is at 'at 1'",
    ]
