"""Whatever the machine: the controller settles, and nobody waits longer than must be."""

from hypothesis import given
from hypothesis import strategies as st

from everstep.checkpoint.snapshots.pacing import Pacing
from tests.support.simulated_trainer import Machine, floor, simulate

SETTLED = 12


@given(
    step_s=st.floats(0.01, 30.0),
    load=st.floats(0.001, 3.0),
    snapshot_bytes=st.integers(10**5, 10**11),
    reached=st.floats(0.2, 1.0),
    slowdown=st.floats(0.0, 1.0),
    steepness=st.floats(1.0, 3.0),
)
def test_it_settles(
    step_s: float,
    load: float,
    snapshot_bytes: int,
    reached: float,
    slowdown: float,
    steepness: float,
) -> None:
    machine = Machine(
        snapshot_bytes=snapshot_bytes,
        copy_bytes_per_s=snapshot_bytes / (load * step_s),
        reached=reached,
        slowdown=slowdown,
        steepness=steepness,
    )
    steps, _ = simulate(machine, lambda _: step_s, 40, Pacing())
    settled = steps[SETTLED:]
    assert len({step.limit for step in settled}) == 1
    for step in settled:
        if step.limit is not None:
            assert step.stall_s == 0
            assert step.inflation <= 2.3 * floor(machine, step_s) + 1e-5
        else:
            assert load > 0.5 * reached  # else there is a limit that would do
            full = machine.slower(machine.copy_bytes_per_s)
            least_stall_s = max(0.0, load - 1 - full) * step_s
            assert step.stall_s <= least_stall_s + 1e-3 * step_s


@given(
    noise=st.floats(0.0, 0.1),
    load=st.floats(0.001, 0.4),
    change=st.floats(0.2, 5.0),
    seed=st.integers(0, 1000),
)
def test_it_follows_a_change_and_forgets_it(
    noise: float, load: float, change: float, seed: int
) -> None:
    machine = Machine(copy_bytes_per_s=1e9 / load, noise=noise)
    steps, _ = simulate(
        machine, lambda i: change if i in range(30, 60) else 1.0, 90, Pacing(), seed
    )
    waits = [i for i, step in enumerate(steps) if step.stall_s > 0]
    unforeseen = {30, 60}  # a step that is suddenly shorter
    if load / change < 0.5:
        assert len(set(waits) - unforeseen) <= 3
