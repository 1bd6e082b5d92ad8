"""Which of the contract's tests run against Ray in the quick suite: actors take seconds."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
QUICK_WITH_RAY = (
    "test_reports_come_in_order_and_whole_and_the_exit_comes_last",
    "test_asking_before_ranks_are_up_is_not_lost",
    "test_kill_ends_ranks_that_never_stop",
    "test_kill_right_after_start_ends_all_ranks",
    "test_ranks_can_be_started_again_once_all_have_ended",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        ours = item.path.parent == HERE and item.get_closest_marker("ray") is not None
        if ours and item.name.partition("[")[0] not in QUICK_WITH_RAY:
            item.add_marker(pytest.mark.slow)
