"""Which launcher runs, decided from the environment."""

import pytest

from everstep.launch import Launcher, check_resume, choose_launcher, external_world_size
from everstep.trainer.errors import ConfigError


@pytest.mark.parametrize(
    ("environment", "world_size"),
    [
        ({}, None),
        ({"RANK": "0"}, None),
        ({"WORLD_SIZE": "4"}, None),
        ({"RANK": "0", "WORLD_SIZE": "many"}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 1),
        ({"RANK": "3", "WORLD_SIZE": "4"}, 4),
        # a batch script, outside of any step
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),
        # an interactive step of one task in an allocation of eight
        (
            {
                "SLURM_PROCID": "0",
                "SLURM_STEP_ID": "0",
                "SLURM_NTASKS": "8",
                "SLURM_STEP_NUM_TASKS": "1",
            },
            None,
        ),
        ({"SLURM_PROCID": "5", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8"}, 8),
        ({"SLURM_PROCID": "5", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "8"}, 8),
    ],
)
def test_who_started_this_process(environment: dict[str, str], world_size: int | None) -> None:
    assert external_world_size(environment) == world_size
    for wants_ray, otherwise in ((False, Launcher.LOCAL), (True, Launcher.RAY)):
        chosen = choose_launcher(Launcher.AUTO, environment, lambda answer=wants_ray: answer)
        assert chosen is (otherwise if world_size is None else Launcher.EXTERNAL)


@pytest.mark.parametrize("asked", [Launcher.LOCAL, Launcher.RAY, Launcher.EXTERNAL])
@pytest.mark.parametrize("wants_ray", [False, True])
def test_an_explicit_launcher_wins(asked: Launcher, wants_ray: bool) -> None:
    for environment in ({}, {"RANK": "0", "WORLD_SIZE": "2"}):
        assert choose_launcher(asked, environment, lambda: wants_ray) is asked


@pytest.mark.parametrize("resume", ["auto", "never", "0", "1200"])
def test_resume_values(resume: str) -> None:
    check_resume(resume)


@pytest.mark.parametrize("resume", ["", "latest", "-1", "1.5", "12x"])
def test_wrong_resume_values(resume: str) -> None:
    with pytest.raises(ConfigError, match="--resume: got"):
        check_resume(resume)
