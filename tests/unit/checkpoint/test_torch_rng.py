"""Random generators come back exactly where they were."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from everstep.checkpoint.errors import StateError
from everstep.checkpoint.torch_rng import derive_rng, rng_states, set_rng_states


@pytest.fixture(autouse=True)
def _leave_as_found() -> Iterator[None]:
    states = rng_states()
    yield
    set_rng_states(states)


def _draw() -> list[float]:
    """From every generator, in ways that leave a half-used normal pair behind."""
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.normal()),
        float(np.random.random()),
        float(torch.randn(())),
        *torch.rand(3).tolist(),
    ]


@pytest.mark.parametrize("draws_before", [0, 1, 2, 700])
def test_the_next_numbers_are_the_same(draws_before: int) -> None:
    derive_rng(1, 2, "dp0")
    for _ in range(draws_before):
        _draw()
    states = rng_states()
    wanted = [_draw() for _ in range(3)]
    set_rng_states(states)
    assert [_draw() for _ in range(3)] == wanted


def test_states_are_bytes_of_fixed_size() -> None:
    derive_rng(1, 2, "dp0")
    sizes = {name: state.shape for name, state in rng_states().items()}
    random.gauss(0, 1)
    np.random.normal()
    states = rng_states()
    assert {name: state.shape for name, state in states.items()} == sizes
    assert {state.dtype for state in states.values()} == {torch.uint8}
    assert states.keys() >= {"torch_cpu", "python", "numpy"}


def test_what_is_not_named_stays() -> None:
    states = rng_states()
    random.random()
    expected = random.getstate()
    set_rng_states({"numpy": states["numpy"]})
    assert random.getstate() == expected


def test_derived_generators_differ_by_seed_step_and_place_and_repeat() -> None:
    seen = []
    for seed, step, place in [(1, 2, "dp0"), (1, 2, "dp1"), (1, 3, "dp0"), (2, 2, "dp0")]:
        derive_rng(seed, step, place)
        seen.append(_draw())
    assert len({tuple(numbers) for numbers in seen}) == 4
    assert len({number for numbers in seen for number in numbers}) == 4 * len(seen[0])
    derive_rng(1, 2, "dp0")
    assert _draw() == seen[0]


def test_another_bit_generator_is_refused() -> None:
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64())
    try:
        with pytest.raises(StateError, match="MT19937"):
            rng_states()
    finally:
        np.random.set_bit_generator(before)
