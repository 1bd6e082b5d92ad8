"""``everstep train``: check the config while that is still quick, choose a launcher, hand over."""

import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from everstep.trainer.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from everstep.trainer.config import RunConfig


class Launcher(StrEnum):
    """Who starts the ranks."""

    AUTO = "auto"
    LOCAL = "local"
    EXTERNAL = "external"


def train(
    ref: str,
    overrides: Sequence[str],
    *,
    launcher: Launcher,
    nproc: int | None,
    resume: str,
    run_dir: Path | None,
    environment: Mapping[str, str],
    console: "Console",
) -> int:
    """Run a config and return the exit code; torch is not imported before everything fits.

    Raises ConfigError for whatever can be known to be wrong without starting a rank, and
    TorchVersionError where torch is missing or too old.
    """
    from everstep.checkpoint.torch_version import require_torch
    from everstep.trainer.config_load import load_config

    check_resume(resume)
    config = load_config(ref, overrides)
    require_torch()
    directory = run_dir or Path("runs") / config.name
    if choose_launcher(launcher, environment) is Launcher.EXTERNAL:
        return _train_external(config, directory, resume, nproc, environment, console)
    return _train_local(config, directory, resume, nproc, environment, console)


def choose_launcher(asked: Launcher, environment: Mapping[str, str]) -> Launcher:
    """``auto`` is external where torchrun or srun has started this process, else local."""
    if asked is not Launcher.AUTO:
        return asked
    return Launcher.LOCAL if external_world_size(environment) is None else Launcher.EXTERNAL


def external_world_size(environment: Mapping[str, str]) -> int | None:
    """Ranks that torchrun (RANK, WORLD_SIZE) or srun has started; None = neither has.

    Inside a batch script or ``salloc`` Slurm sets a rank and a number of tasks too, but no task
    step: only with a step of several tasks is this process one of many.
    """
    if "RANK" in environment and environment.get("WORLD_SIZE", "").isdigit():
        return int(environment["WORLD_SIZE"])
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
        tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "")
        if tasks.isdigit() and int(tasks) > 1:
            return int(tasks)
    return None


def check_resume(resume: str) -> None:
    """Raise ConfigError unless ``resume`` is 'auto', 'never' or a step."""
    if resume not in ("auto", "never") and not re.fullmatch(r"[0-9]+", resume):
        raise ConfigError(
            f"--resume: got {resume!r}, expected 'auto' (newest checkpoint, if any), 'never', or "
            "the step of a checkpoint"
        )


def _train_local(
    config: "RunConfig",
    run_dir: Path,
    resume: str,
    nproc: int | None,
    environment: Mapping[str, str],
    console: "Console",
) -> int:
    from everstep.machine import count_gpus
    from everstep.trainer.mesh_shape import check_config, local_device, resolve_mesh, world_size_of

    gpus = count_gpus(environment)
    world_size = world_size_of(config.mesh, nproc, gpus)
    check_config(config, resolve_mesh(config.mesh, world_size))
    device = local_device(config.parallel.device, gpus, world_size)
    if gpus and config.parallel.device == "auto" and device == "cpu":
        console.print(
            f"training on the CPU: each of the {world_size} ranks needs a GPU of its own, and this "
            f"host has {gpus}",
            soft_wrap=True,
        )

    from everstep.cluster.controller import run_local

    return run_local(config, run_dir, resume, world_size, console)


def _train_external(
    config: "RunConfig",
    run_dir: Path,
    resume: str,
    nproc: int | None,
    environment: Mapping[str, str],
    console: "Console",
) -> int:
    from everstep.trainer.mesh_shape import check_config, resolve_mesh

    if nproc is not None:
        raise ConfigError(
            f"--nproc={nproc} is for the local launcher, and here torchrun or srun has started the "
            "ranks: leave it out, or add --launcher local"
        )
    world_size = external_world_size(environment)
    if world_size is not None:
        check_config(config, resolve_mesh(config.mesh, world_size))

    from everstep.cluster.external import run_external

    return run_external(config, run_dir, resume, console)
