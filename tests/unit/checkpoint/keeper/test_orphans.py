"""What is made durable when no trainer is left."""

from everstep.checkpoint.keeper.orphans import is_hopeless, worth_flushing
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.snapshots.memory import FlushOrder
from everstep.checkpoint.snapshots.slot_format import Seal, owner_digest


def held(step: int, rank: int, world_size: int = 2, owner: str = "a") -> tuple[str, Seal]:
    return f"{owner}{step}.{rank}", Seal(
        step_id=StepId(1, step),
        rank=rank,
        world_size=world_size,
        owner=owner_digest(owner),
        part_start=4096,
        part_bytes=1,
        pack_start=8192,
        pack_bytes=1,
        part_crc32c=0,
    )


def test_the_newest_that_is_whole_here() -> None:
    slots = [held(4, 0), held(4, 1), held(5, 0), held(5, 1), held(6, 0)]
    chosen, why = worth_flushing(slots, StepId(1, 4))
    assert sorted(chosen) == ["a5.0", "a5.1"]
    assert why == "step 5 is whole on this node"


def test_ranks_elsewhere_make_it_whole() -> None:
    slots = [held(step, rank, 4) for step in (4, 5, 6) for rank in (0, 1)]
    assert sorted(worth_flushing(slots, StepId(1, 5))[0]) == ["a5.0", "a5.1", "a6.0", "a6.1"]
    assert worth_flushing(slots, None)[0] == []
    assert worth_flushing(slots, StepId(1, 7))[0] == []


def test_runs_and_sizes_are_not_mixed() -> None:
    slots = [held(4, 0), held(4, 1, owner="b"), held(4, 1, 3)]
    assert worth_flushing(slots, None)[0] == []
    slots += [held(3, 0, 1, "c"), held(2, 0, 1, "c"), held(1, 0, 1, "d")]
    assert sorted(worth_flushing(slots, None)[0]) == ["c3.0", "d1.0"]


def test_nothing() -> None:
    assert worth_flushing([], StepId(1, 4))[0] == []


def test_a_flush_that_waits_for_a_rank_that_never_sealed() -> None:
    order = FlushOrder(directory="d", step_id=StepId(1, 5), rank=0, world_size=2, keep=1)
    both, one = [held(5, 0)[1], held(5, 1)[1]], [held(5, 0)[1], held(4, 1)[1]]
    assert is_hopeless(order, {0, 1}, one)
    assert not is_hopeless(order, {0, 1}, both)
    assert not is_hopeless(order, {0}, one)  # the other node knows
