"""Which Ray a command uses."""

import pytest

from everstep.cluster.ray_address import ray_address, require_ray
from everstep.trainer.config import LaunchConfig
from everstep.trainer.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "variable", "found"),
    [
        (None, None, None),
        (None, "", None),
        (None, "local", None),
        ("local", "head:6379", None),
        (None, "head:6379", "head:6379"),
        ("auto", "head:6379", "auto"),
        ("10.0.0.1:1", None, "10.0.0.1:1"),
        ("[::1]:6379", None, "[::1]:6379"),
    ],
)
def test_the_config_comes_before_the_environment(
    given: str | None, variable: str | None, found: str | None
) -> None:
    environment = {} if variable is None else {"RAY_ADDRESS": variable}
    assert ray_address(LaunchConfig(address=given), environment) == found


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:port", "head:65536"])
def test_no_address(address: str) -> None:
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS: got .*, expected 'host:port'"):
        ray_address(LaunchConfig(), {"RAY_ADDRESS": address})


def test_an_address_from_outside_leads_to_submit() -> None:
    with pytest.raises(ConfigError, match=r"launch.address=ray://h:10001 is for .*everstep submit"):
        ray_address(LaunchConfig(address="ray://h:10001"), {})


def test_without_ray_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everstep.cluster.ray_address.ray_installed", lambda: False)
    with pytest.raises(ConfigError, match=r"pip install 'everstep\[ray\]'"):
        require_ray()
