"""``everstep train``: check the config while that is still quick, choose a launcher, hand over."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    RAY = "ray"
    EXTERNAL = "external"


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A run to be started, whoever starts its ranks."""

    config: "RunConfig"
    run_dir: Path
    resume: str
    nproc: int | None
    """As asked for; None: as many as the mesh and the GPUs say."""
    environment: Mapping[str, str]
    console: "Console"
    again: Sequence[str]
    """Options that suggested commands repeat."""

    def plan_ranks(self, gpus: int, where: str) -> tuple[int, str]:
        """Number of ranks and their device, where there are ``gpus``. Raises ConfigError."""
        from everstep.trainer.mesh_shape import (
            check_config,
            local_device,
            resolve_mesh,
            world_size_of,
        )

        asked = self.config.parallel.device
        world_size = world_size_of(self.config.mesh, self.nproc, gpus)
        check_config(self.config, resolve_mesh(self.config.mesh, world_size))
        device = local_device(asked, gpus, world_size, where)
        if gpus and asked == "auto" and device == "cpu":
            self.console.print(
                f"training on the CPU: each of the {world_size} ranks needs a GPU of its own, and "
                f"{where} has {gpus}",
                soft_wrap=True,
            )
        return world_size, device


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
    address: str | None = None,
) -> int:
    """Run a config and return the exit code; torch is not imported before everything fits.

    ``address`` is short for launch.address. Raises ConfigError for whatever can be known to be
    wrong without starting a rank, and TorchVersionError where torch is missing or too old.
    """
    from everstep.checkpoint.torch_version import require_torch
    from everstep.trainer.config_load import load_config

    check_resume(resume)
    if address is not None:
        overrides = [*overrides, f"launch.address={address}"]
    config = load_config(ref, overrides)
    require_torch()
    chosen = choose_launcher(launcher, environment, lambda: _wants_ray(config, nproc, environment))
    if address is not None and chosen is not Launcher.RAY:
        raise ConfigError(
            f"--address={address} names a Ray cluster, and --launcher {chosen} uses none: leave "
            "one of them out"
        )
    run = _Run(
        config=config,
        run_dir=run_dir or Path("runs") / config.name,
        resume=resume,
        nproc=nproc,
        environment=environment,
        console=console,
        again=[] if launcher is Launcher.AUTO else ["--launcher", launcher.value],
    )
    if chosen is Launcher.EXTERNAL:
        return _train_external(run)
    return _train_ray(run) if chosen is Launcher.RAY else _train_local(run)


def choose_launcher(
    asked: Launcher, environment: Mapping[str, str], wants_ray: Callable[[], bool]
) -> Launcher:
    """``auto`` is external where torchrun or srun has started this process, else Ray or local."""
    if asked is not Launcher.AUTO:
        return asked
    if external_world_size(environment) is not None:
        return Launcher.EXTERNAL
    return Launcher.RAY if wants_ray() else Launcher.LOCAL


def _wants_ray(config: "RunConfig", nproc: int | None, environment: Mapping[str, str]) -> bool:
    """Whether Ray is of use, and installed: to reach a cluster, or for several ranks."""
    from everstep.cluster.ray_address import ray_address, ray_installed
    from everstep.machine import count_gpus
    from everstep.trainer.mesh_shape import world_size_of

    if config.launch.address is not None:
        return True  # where Ray is missing, that is an error
    if not ray_installed():
        return False
    if ray_address(config.launch, environment) is not None:
        return True
    return world_size_of(config.mesh, nproc, count_gpus(environment)) > 1


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


def _train_local(run: _Run) -> int:
    from everstep.machine import count_gpus

    world_size, _ = run.plan_ranks(count_gpus(run.environment), "this host")

    from everstep.cluster.run import run_local

    return run_local(run.config, run.run_dir, run.resume, world_size, run.console, launch=run.again)


def _train_ray(run: _Run) -> int:
    from everstep.cluster.ray_address import ray_address, require_ray
    from everstep.machine import visible_gpus

    require_ray()
    address = ray_address(run.config.launch, run.environment)
    if address is None:
        gpus = visible_gpus(run.environment)
        world_size, device = run.plan_ranks(len(gpus), "this host")
        used = gpus[:world_size] if device == "cuda" else []

        from everstep.cluster.ray_run import run_on_own_ray

        return run_on_own_ray(
            run.config,
            run.run_dir,
            run.resume,
            world_size,
            run.console,
            gpus=used,
            launch=run.again,
        )
    from everstep.cluster.ray_run import run_in_cluster

    return run_in_cluster(
        run.config,
        run.run_dir,
        run.resume,
        address,
        run.console,
        plan=lambda gpus: run.plan_ranks(gpus, "the Ray cluster"),
        launch=run.again,
    )


def _train_external(run: _Run) -> int:
    from everstep.trainer.mesh_shape import check_config, resolve_mesh

    if run.nproc is not None:
        raise ConfigError(
            f"--nproc={run.nproc} is for the local launcher, and here torchrun or srun has started "
            "the ranks: leave it out, or add --launcher local"
        )
    world_size = external_world_size(run.environment)
    if world_size is not None:
        check_config(run.config, resolve_mesh(run.config.mesh, world_size))

    from everstep.cluster.external import run_external

    return run_external(run.config, run.run_dir, run.resume, run.console)
