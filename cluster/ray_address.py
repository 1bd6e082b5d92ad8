"""Which Ray a command uses, from what the user said: pure, and imports neither ray nor the like."""

import importlib.util
from collections.abc import Mapping

from everstep.trainer.config import LaunchConfig
from everstep.trainer.errors import ConfigError


def ray_installed() -> bool:
    """Whether ray can be imported; does not import it."""
    return importlib.util.find_spec("ray") is not None


def require_ray() -> None:
    """Raise ConfigError where ray is not installed; does not import it."""
    if not ray_installed():
        raise ConfigError(
            "--launcher ray needs ray, which is not installed: pip install 'everstep[ray]', or use "
            "--launcher local"
        )


def ray_address(launch: LaunchConfig, environment: Mapping[str, str]) -> str | None:
    """The cluster to join, from the config or else RAY_ADDRESS; None = a Ray of the run's own.

    Raises ConfigError for an address that cannot be joined from within a cluster.
    """
    name = "RAY_ADDRESS" if launch.address is None else "launch.address"
    address = launch.address or environment.get("RAY_ADDRESS") or "local"
    if address == "local":
        return None
    if "://" in address:
        raise ConfigError(
            f"{name}={address} is for programs outside of the cluster: use everstep submit CONFIG "
            "--address http://HEAD:8265, or, on a node of the cluster, give 'host:port' or 'auto'"
        )
    host, _, port = address.rpartition(":")
    if address != "auto" and not (host and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(
            f"{name}: got {address!r}, expected 'host:port' of the head of a Ray cluster (often "
            "port 6379), or 'auto' on one of its nodes"
        )
    return address
