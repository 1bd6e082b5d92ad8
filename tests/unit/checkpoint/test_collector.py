"""The collector is as it was before, whatever happens in between."""

import gc

import pytest

from everstep.checkpoint.collector import collector_paused


@pytest.mark.parametrize("enabled", [True, False])
def test_it_is_off_inside_and_as_before_outside(enabled: bool) -> None:
    def fail() -> None:
        with collector_paused():
            assert not gc.isenabled()
            raise ValueError("in between")

    was_enabled = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with collector_paused(), collector_paused():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
        with pytest.raises(ValueError, match="in between"):
            fail()
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()
