"""Where ranks go in a Ray cluster, and what is said when they cannot: no Ray is needed."""

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.cluster.ray_plan import (
    Node,
    bundle_of,
    rank_order,
    ranks_that_fit,
    seats_of,
    too_small,
    version_difference,
    waiting_words,
    why_it_died,
)


def node(
    name: str, resources: Mapping[str, float] | None = None, address: str = "", rack: str = ""
) -> Node:
    return Node(
        node_id=name * 8,
        address=address or f"10.0.0.{ord(name)}",
        hostname=f"host-{name}",
        port=7,
        resources=resources or {"CPU": 4},
        labels={"rack": rack} if rack else {},
    )


def test_what_is_reserved_for_a_rank() -> None:
    assert bundle_of(1.0, 0, {}) == {"CPU": 1.0}
    assert bundle_of(2.5, 1, {"fast": 2}) == {"CPU": 2.5, "GPU": 1.0, "fast": 2}
    assert bundle_of(0, 1, {}) == {"GPU": 1.0}
    assert bundle_of(0, 0, {}) == {"CPU": 0.001}


@pytest.mark.parametrize(
    ("placement", "fit"), [("pack", 5), ("spread", 5), ("strict_pack", 3), ("strict_spread", 2)]
)
def test_how_many_ranks_fit(placement: str, fit: int) -> None:
    nodes = [node("a", {"CPU": 2}), node("b", {"CPU": 3.9}), node("c", {"GPU": 8})]
    assert ranks_that_fit(nodes, {"CPU": 1}, placement) == fit
    assert ranks_that_fit([], {"CPU": 1}, placement) == 0


def test_fractions_fit_whole() -> None:
    assert ranks_that_fit([node("a", {"CPU": 0.3})], {"CPU": 0.1}, "pack") == 3


def test_a_cluster_that_is_too_small_is_one_sentence() -> None:
    nodes = [node("a", {"CPU": 3}), node("b", {"CPU": 2, "GPU": 1})]
    assert too_small(nodes, {"CPU": 1}, 5, "pack") is None
    assert too_small(nodes, {"CPU": 1, "GPU": 1}, 2, "strict_pack") == (
        "the Ray cluster is too small for 2 ranks of 1 CPU, 1 GPU each with "
        "launch.placement=strict_pack: it holds 1 (its 2 nodes: 3 CPU, 0 GPU; 2 CPU, 1 GPU); use a "
        "smaller mesh, lower launch.cpus_per_rank or launch.resources_per_rank, or add nodes "
        "(launch.wait_for_nodes=true waits for an autoscaler to do so)"
    )
    many = too_small([node("a")] * 40, {"CPU": 5}, 1, "pack")
    assert many is not None
    assert "; and 30 more)" in many


def test_waiting_names_what_is_missing() -> None:
    assert waiting_words({"CPU": 2, "GPU": 1}, 4, {"CPU": 3.0}) == (
        "waiting for room in the Ray cluster: 8 CPU, 4 GPU needed, 3 CPU, 0 GPU free now"
    )


def test_ranks_of_a_node_and_of_a_domain_are_consecutive() -> None:
    a, b, c, d = node("a", rack="x"), node("b", rack="y"), node("c", rack="x"), node("d")
    bundles = [a, b, c, b, d, a, b, c, c]
    order = rank_order(bundles, "rack")
    assert [bundles[index].hostname[-1] for index in order] == list("cccaabbbd")
    assert [bundles[index].hostname[-1] for index in rank_order(bundles, None)] == list("bbbcccaad")


def test_nodes_that_are_simulated_on_one_host_share_its_local_ranks() -> None:
    one, two = node("a", address="1.2.3.4"), node("b", address="1.2.3.4")
    seats = seats_of([one, one, two, node("c", rack="r")], "rack")
    assert [seat.local_rank for seat in seats] == [0, 1, 2, 0]
    assert [seat.local_world_size for seat in seats] == [3, 3, 3, 1]
    assert [seat.node for seat in seats] == [one.node_id, one.node_id, two.node_id, "c" * 8]
    assert [seat.failure_domain for seat in seats] == [one.node_id, one.node_id, two.node_id, "r"]


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=24), st.booleans())
def test_every_bundle_gets_one_rank_and_groups_stay_together(
    where: Sequence[str], labelled: bool
) -> None:
    racks = dict(zip("abcde", "xxyyx", strict=True))
    hosts = dict(zip("abcde", "11233", strict=True))
    bundles = [node(name, address=f"10.0.0.{hosts[name]}", rack=racks[name]) for name in where]
    order = rank_order(bundles, "rack" if labelled else None)
    assert sorted(order) == list(range(len(bundles)))
    names = [where[bundle] for bundle in order]
    groups = [[racks[name], name] if labelled else [name] for name in names]
    for depth in range(len(groups[0])):
        runs = [group[depth] for index, group in enumerate(groups)
                if index == 0 or groups[index - 1][depth] != group[depth]]  # fmt: skip
        assert len(runs) == len(set(runs))


@pytest.mark.parametrize(
    ("message", "facts", "words"),
    [
        ("killed", {}, None),
        ("killed", {"node_answers": False}, "went down with node host-a (10.0.0.97, Ray node "),
        ("The actor died because its node has died. Node Id: x", {}, "went down with node host-a"),
        ("", {"out_of_memory": True}, "was killed by Ray because the memory of node host-a"),
        (
            "The actor died, trace:\n  File x\nModuleNotFoundError: No module named 'everstep'\n",
            {"begun": False},
            "cannot be started on node host-a (10.0.0.97, Ray node aaaaaaaa) (ModuleNotFoundError: "
            "No module named 'everstep'): install there",
        ),
    ],
)
def test_how_an_actor_ended(message: str, facts: dict[str, bool], words: str | None) -> None:
    known = {"node_answers": True, "begun": True, "out_of_memory": False, **facts}
    why = why_it_died(message, node("a"), **known)
    assert (why is None) == (words is None)
    assert why is None or words is None or why.startswith(words)


def test_versions_that_differ_are_named() -> None:
    ours = {"Python": "3.11.7", "torch": "2.13.0"}
    assert version_difference(ours, {**ours, "ray": "1"}, "n") is None
    assert version_difference(ours, {**ours, "torch": "2.12.0"}, "n") == (
        "node n has torch 2.12.0, and this command runs with torch 2.13.0: install the same on all "
        "nodes"
    )
    missing = version_difference(ours, {"Python": "3.11.7"}, "n")
    assert missing is not None
    assert missing.startswith("node n has no torch, and")
