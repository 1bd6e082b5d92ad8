"""The controller of copies and flushes, driven by a simulated training."""

from dataclasses import replace
from itertools import pairwise
from statistics import mean

import pytest

from everstep.checkpoint.snapshots.pacing import (
    Pacing,
    PacingSettings,
    StepFacts,
    after_step,
    flush_rate,
)
from tests.support.simulated_trainer import Machine, Simulated, floor, simulate

STEP_S = 1.0


def _steady(compute_s: float = STEP_S, steps: int = 30, **more: float) -> list[Simulated]:
    return simulate(Machine(**more), lambda _: compute_s, steps, Pacing())[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("steepness", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("reached", [1.0, 0.7, 0.3])
def test_it_settles_at_the_lowest_rate_with_a_margin(steepness: float, reached: float) -> None:
    steps = _steady(steepness=steepness, reached=reached)
    settled = steps[6:]
    assert len({step.limit for step in settled}) == 1
    for step in settled:
        assert step.stall_s == 0
        assert step.copied_s is not None
        assert 0.65 * step.window_s < step.copied_s < 0.9 * step.window_s
        machine = Machine(steepness=steepness)
        assert step.inflation < 1.6 * floor(machine, STEP_S) + 1e-6
    assert sum(step.stall_s > 0 for step in steps) <= 2


def test_pacing_disturbs_less_than_full_speed() -> None:
    paced = _steady(30)
    free, _ = simulate(
        Machine(), lambda _: STEP_S, 30, Pacing(settings=PacingSettings(paced_copy=False))
    )
    assert {step.limit for step in free} == {None}
    assert mean(s.inflation for s in paced[6:]) < 0.3 * mean(s.inflation for s in free)


def test_with_noise_fences_hardly_ever_wait() -> None:
    for seed in range(5):
        steps, _ = simulate(Machine(noise=0.08), lambda _: STEP_S, 300, Pacing(), seed)
        assert sum(step.stall_s > 0 for step in steps) <= 3
        limits = [step.limit for step in steps[6:]]
        assert all(limit is not None for limit in limits)
        assert max(limits) < 1.4 * min(limits)  # type: ignore[type-var, operator]
        assert mean(s.inflation for s in steps[6:]) < 2.0 * floor(Machine(), STEP_S)


def test_one_long_step_changes_nothing() -> None:
    steps, _ = simulate(Machine(), lambda i: 20 * STEP_S if i in (15, 30) else STEP_S, 45, Pacing())
    assert len({step.limit for step in steps[6:]}) == 1
    assert all(step.stall_s == 0 for step in steps[6:])


def test_a_slow_warm_up_is_forgotten() -> None:
    steps, _ = simulate(Machine(), lambda i: 30 * STEP_S if i < 3 else STEP_S, 30, Pacing())
    assert steps[3].stall_s > 0  # it could not be known
    assert all(step.stall_s == 0 for step in steps[4:])
    assert len({step.limit for step in steps[8:]}) == 1


def test_a_training_that_becomes_slower_is_disturbed_less_soon() -> None:
    steps, _ = simulate(Machine(), lambda i: STEP_S if i < 15 else 3 * STEP_S, 30, Pacing())
    assert all(step.stall_s == 0 for step in steps[1:])
    before, after = steps[14].limit, steps[20].limit
    assert before is not None
    assert after is not None
    assert after < 0.4 * before


def test_a_copier_that_is_only_just_fast_enough_is_not_limited() -> None:
    steps = _steady(copy_bytes_per_s=1.05e9)
    assert {step.limit for step in steps} == {None}
    assert all(step.stall_s == 0 for step in steps)


def test_one_that_is_too_slow_is_not_limited_either() -> None:
    steps = _steady(copy_bytes_per_s=0.2e9)
    assert {step.limit for step in steps} == {None}
    assert all(step.stall_s > 0 for step in steps)


def test_when_copies_become_slow_the_limit_goes_and_comes_back() -> None:
    fast, slow = Machine(), Machine(copy_bytes_per_s=0.9e9)
    steps, pacing = simulate(fast, lambda _: STEP_S, 15, Pacing())
    worse, pacing = simulate(slow, lambda _: STEP_S, 30, pacing)
    better, pacing = simulate(fast, lambda _: STEP_S, 80, pacing)
    assert steps[-1].limit is not None
    assert {step.limit for step in worse[-15:]} == {None}
    assert len({step.limit for step in better[-10:]}) == 1
    assert better[-1].limit == pytest.approx(steps[-1].limit, rel=0.2)


def test_a_copier_that_cannot_keep_limits_is_asked_to_ever_more_seldom() -> None:
    steps = _steady(copy_bytes_per_s=2e9, reached=0.4, steps=2000)
    waits = [i for i, step in enumerate(steps) if step.stall_s > 0]
    assert 1 < len(waits) < 14
    gaps = [b - a for a, b in pairwise(waits) if b - a > 2]
    assert gaps == sorted(gaps)


def test_one_starved_capture_does_not_end_the_limit() -> None:
    _, pacing = simulate(Machine(), lambda _: STEP_S, 10, Pacing())
    starved = StepFacts(
        window_s=1.0, snapshot_bytes=10**9, background_bytes=10**6, background_s=1.0
    )
    steps, _ = simulate(Machine(), lambda _: STEP_S, 30, after_step(pacing, starved))
    assert all(step.limit is not None and step.stall_s == 0 for step in steps)
    assert steps[-1].limit == pytest.approx(pacing.copy_bytes_per_s, rel=0.1)


def test_steps_that_are_not_captured_only_tell_their_time() -> None:
    _, pacing = simulate(Machine(), lambda _: STEP_S, 10, Pacing())
    skipped = after_step(pacing, StepFacts(window_s=0.5))
    assert skipped.copy_bytes_per_s == pacing.copy_bytes_per_s
    captured = after_step(
        skipped,
        StepFacts(window_s=1.0, snapshot_bytes=10**9, background_bytes=10**9, background_s=0.8),
    )
    assert captured.copy_bytes_per_s == pytest.approx(10**9 / (0.8 * 0.5), rel=0.1)


def test_nothing_known_is_full_speed() -> None:
    assert Pacing().copy_bytes_per_s is None
    assert after_step(Pacing(), StepFacts(window_s=0.0, snapshot_bytes=5)).copy_bytes_per_s is None


def test_the_rate_of_a_flush_that_begins() -> None:
    settings = PacingSettings(flush_share=0.5)
    assert flush_rate(10**9, 100.0, 100.0, settings) == pytest.approx(2e7)
    assert flush_rate(10**9, 100.0, 100.0, replace(settings, flush_share=0.25)) == pytest.approx(
        4e7
    )
    assert flush_rate(10**9, 50.0, 100.0, settings) is None
    assert flush_rate(10**9, 10.0, 100.0, settings) is None
    assert flush_rate(0, 100.0, 100.0, settings) is None


@pytest.mark.parametrize(
    ("storage_bytes_per_s", "done_by_s"), [(1e9, 51.0), (2.1e7, 51.0), (1.5e7, 68.0), (0.5e7, None)]
)
def test_flushes_end_in_their_share_if_the_storage_can(
    storage_bytes_per_s: float, done_by_s: float | None
) -> None:
    settings, left, rates = PacingSettings(), 10**9, list[float | None]()
    done_s = None
    for second in range(100):
        rate = flush_rate(left, 100.0 - second, 100.0, settings)
        rates.append(rate)
        left -= int(min(rate or storage_bytes_per_s, storage_bytes_per_s))
        if left <= 0:
            done_s = second + 1.0
            break
    assert rates[0] == pytest.approx(2e7)
    if done_by_s is None:
        assert done_s is None
    else:
        assert done_s is not None
        assert done_s <= done_by_s
    if storage_bytes_per_s > 2e7:
        assert all(rate == pytest.approx(2e7) for rate in rates[:-1])
