"""What a restart resumes from, and what it says about it."""

from hypothesis import given
from hypothesis import strategies as st

from everstep.checkpoint.lineage import Generation, StepId, in_lineage
from everstep.checkpoint.snapshots.recover import Choice, Held, choose_restore, passed_over
from everstep.checkpoint.snapshots.slot_format import Seal, owner_digest


def _generation(number: int, fork: tuple[int, int] | None = None) -> Generation:
    return Generation(
        number=number,
        parent=fork[0] if fork else None,
        fork_step=fork[1] if fork else None,
        created_s=0.0,
        mesh={},
        owner=f"attempt {number}",
    )


ONE = {1: _generation(1)}
FORKED = {1: _generation(1), 2: _generation(2, (1, 40))}


def _held(
    step: int,
    ranks: str,
    world_size: int,
    *,
    generation: int = 1,
    owner: str | None = None,
    place: str = "here",
) -> list[Held]:
    """``_held(41, "013", 4)``: step 41 of 4 ranks, sealed on three of them."""
    return [
        Held(
            Seal(
                step_id=StepId(generation, step),
                rank=int(rank),
                world_size=world_size,
                owner=owner_digest(f"attempt {generation}" if owner is None else owner),
                part_start=4096,
                part_bytes=10,
                pack_start=8192,
                pack_bytes=100,
                part_crc32c=0,
            ),
            place,
        )
        for rank in ranks
    ]


def _brief(choices: list[Choice]) -> list[tuple[StepId, str]]:
    return [(choice.step_id, choice.tier) for choice in choices]


def test_nothing_anywhere() -> None:
    assert choose_restore([], [], {}) == []
    assert choose_restore([], [], ONE) == []
    assert passed_over([], ONE) == []


def test_the_newest_whole_step_and_memory_before_storage() -> None:
    held = [*_held(41, "01", 2), *_held(40, "10", 2)]
    choices = choose_restore(held, [StepId(1, 40), StepId(1, 30)], ONE)
    assert _brief(choices) == [
        (StepId(1, 41), "memory"),
        (StepId(1, 40), "memory"),
        (StepId(1, 40), "durable"),
        (StepId(1, 30), "durable"),
    ]
    assert [choice.why for choice in choices] == [
        "step 41 is in memory on all 2 ranks",
        "step 40 is in memory on all 2 ranks",
        "step 40 is the newest durable checkpoint",
        "step 30 is an older durable checkpoint",
    ]


def test_a_newer_durable_step_wins() -> None:
    choices = choose_restore(_held(39, "0", 1), [StepId(1, 40)], ONE)
    assert _brief(choices) == [(StepId(1, 40), "durable"), (StepId(1, 39), "memory")]
    assert choices[1].why == "step 39 is in memory on its only rank"


def test_an_incomplete_step_is_passed_over_and_named() -> None:
    held = [*_held(41, "013", 4), *_held(40, "0123", 4)]
    (choice,) = choose_restore(held, [], ONE)
    assert choice.step_id == StepId(1, 40)
    assert choice.why == (
        "step 40 is in memory on all 4 ranks (not used: step 41 is in memory on 3 of 4 ranks only, "
        "that of rank 2 is gone or was never complete)"
    )
    assert choose_restore(held[:3], [], ONE) == []
    assert passed_over(held, ONE) == [
        "step 41 is in memory on 3 of 4 ranks only, that of rank 2 is gone or was never complete"
    ]


def test_what_is_older_than_the_choice_is_not_mentioned() -> None:
    choices = choose_restore([*_held(40, "01", 2), *_held(39, "0", 2)], [StepId(1, 30)], ONE)
    assert "39" not in choices[0].why
    assert "step 39 is in memory on 1 of 2 ranks only" in choices[1].why


def test_parts_of_different_steps_never_make_one() -> None:
    assert choose_restore([*_held(41, "0", 2), *_held(40, "1", 2)], [], ONE) == []


def test_parts_of_different_world_sizes_never_make_one() -> None:
    assert choose_restore([*_held(41, "0", 2), *_held(41, "1", 3)], [], ONE) == []


def test_equal_numbers_of_another_run() -> None:
    stranger = _held(41, "01", 2, owner="somebody else")
    assert choose_restore(stranger, [], ONE) == []
    assert choose_restore([*_held(41, "0", 2), *stranger[1:]], [], ONE) == []
    (choice,) = choose_restore([*stranger, *_held(40, "01", 2)], [], ONE)
    assert choice.why.endswith("(not used: step 41 in memory belongs to another run)")
    assert choose_restore(_held(41, "01", 2), [], {}) == []


def test_a_step_that_the_newest_generation_does_not_inherit() -> None:
    held = [*_held(41, "01", 2), *_held(40, "01", 2)]
    (choice,) = choose_restore(held, [StepId(1, 45)], FORKED)
    assert _brief([choice]) == [(StepId(1, 40), "memory")]
    assert "step 41 of generation 1 is not of this lineage" in choice.why


def test_the_own_step_counts_before_the_inherited_one() -> None:
    held = _held(40, "0", 1, generation=2)
    choices = choose_restore(held, [StepId(1, 40), StepId(1, 39)], FORKED)
    assert _brief(choices) == [(StepId(2, 40), "memory"), (StepId(1, 39), "durable")]
    # but not if it is not whole
    choices = choose_restore(_held(40, "0", 2, generation=2), [StepId(1, 40)], FORKED)
    assert _brief(choices) == [(StepId(1, 40), "durable")]


def test_only_the_step_asked_for() -> None:
    held = [*_held(41, "01", 2), *_held(40, "0", 2)]
    durable = [StepId(1, 40), StepId(1, 30)]
    assert _brief(choose_restore(held, durable, ONE, step=40)) == [(StepId(1, 40), "durable")]
    assert _brief(choose_restore(held, durable, ONE, step=41)) == [(StepId(1, 41), "memory")]
    assert choose_restore(held, durable, ONE, step=39) == []


def test_each_rank_comes_from_the_first_that_holds_it() -> None:
    held = [*_held(41, "1", 2, place="near"), *_held(41, "01", 2, place="far")]
    (choice,) = choose_restore(held, [], ONE)
    assert choice.places == ("far", "near")


generations = st.builds(
    lambda forks: {
        n: _generation(n, (min(fork[0], n - 1), fork[1]) if fork and n > 1 else None)
        for n, fork in enumerate(forks, 1)
    },
    st.lists(st.none() | st.tuples(st.integers(1, 2), st.integers(0, 4)), max_size=3),
)
sightings = st.lists(
    st.tuples(
        st.integers(1, 3), st.integers(0, 4), st.integers(0, 1), st.integers(1, 2), st.booleans()
    ),
    max_size=10,
)
committed = st.lists(st.builds(StepId, st.integers(1, 3), st.integers(0, 4)), max_size=4)


@given(sightings, committed, generations)
def test_against_all_sets_of_slots(
    seen: list[tuple[int, int, int, int, bool]],
    durable: list[StepId],
    generations: dict[int, Generation],
) -> None:
    held = [
        slot
        for generation, step, rank, world_size, ours in seen
        if rank < world_size
        for slot in _held(
            step, str(rank), world_size, generation=generation, owner=None if ours else "stranger"
        )
    ]
    facts = {
        (slot.seal.step_id, slot.seal.world_size, slot.seal.rank)
        for slot in held
        if slot.seal.owner == owner_digest(f"attempt {slot.seal.step_id.generation}")
    }
    whole = {
        step_id
        for step_id, world_size, _ in facts
        if step_id.generation in generations
        and all((step_id, world_size, rank) in facts for rank in range(world_size))
    }
    lineage = in_lineage(generations, {*whole, *durable})
    expected = [
        (step_id, tier)
        for step_id in reversed(lineage)
        for tier, among in (("memory", whole), ("durable", {*durable}))
        if step_id in among
    ]
    assert _brief(choose_restore(held, durable, generations)) == expected
