"""The optimizers of ranks that hold different parameters become one."""

import pytest

from everstep.checkpoint.errors import LayoutError
from everstep.checkpoint.optimizer_parts import digest_values, merge_values


def test_parameters_are_joined_and_the_first_rank_has_its_way() -> None:
    first = {
        "groups": [{"params": ["a", "tied"], "lr": 1.0}, {"params": ["n"], "lr": 2.0}],
        "values": {"a": {"step": 1}, "tied": {"step": 2}},
    }
    second = {
        "groups": [{"params": ["tied", "b"], "lr": 9.0}, {"params": [], "lr": 2.0}],
        "values": {"b": {"step": 3}, "tied": {"step": 9}},
    }
    merged = merge_values([first, second])
    assert merged == {
        "groups": [{"params": ["a", "tied", "b"], "lr": 1.0}, {"params": ["n"], "lr": 2.0}],
        "values": {"a": {"step": 1}, "tied": {"step": 2}, "b": {"step": 3}},
    }
    assert merge_values([first]) == first
    assert digest_values(merged) != digest_values(first) == digest_values(dict(first))


def test_ranks_with_other_groups_are_refused() -> None:
    parts = [{"groups": [{"params": [str(n)]}] * n, "values": {}} for n in (1, 2)]
    with pytest.raises(LayoutError, match=r"optimizers with \[1, 2\] parameter groups"):
        merge_values(parts)
