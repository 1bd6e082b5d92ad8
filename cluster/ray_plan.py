"""Which rank goes where in a Ray cluster, and what Ray's answers mean: pure functions, no Ray."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from everstep.cluster.causes import LESS_MEMORY, one_line
from everstep.cluster.driver import Seat

_NODE_DIED = ("its node has died", "node died", "node is dead", "node was terminated")
_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node of a Ray cluster."""

    node_id: str
    address: str
    """IP address; nodes that are simulated on one host share it."""
    hostname: str
    port: int
    """Port of its raylet."""
    resources: Mapping[str, float]
    """All that it has, whoever uses it now."""
    labels: Mapping[str, str]

    @property
    def name(self) -> str:
        """For a person."""
        return f"{self.hostname} ({self.address}, Ray node {self.node_id[:8]})"


def bundle_of(cpus: float, gpus: int, resources: Mapping[str, float]) -> dict[str, float]:
    """What Ray reserves for one rank; never empty, since Ray refuses that."""
    asked = {"CPU": cpus, "GPU": float(gpus), **resources}
    found = {name: amount for name, amount in asked.items() if amount > 0}
    return found or {"CPU": 0.001}


def ranks_that_fit(nodes: Sequence[Node], bundle: Mapping[str, float], placement: str) -> int:
    """How many ranks the nodes hold when nobody else uses them."""
    room = [
        min(
            math.floor(node.resources.get(name, 0) / amount + 1e-9)
            for name, amount in bundle.items()
        )
        for node in nodes
    ]
    if placement == "strict_pack":
        return max(room, default=0)
    if placement == "strict_spread":
        return sum(fits > 0 for fits in room)
    return sum(room)


def too_small(
    nodes: Sequence[Node], bundle: Mapping[str, float], world_size: int, placement: str
) -> str | None:
    """Why the cluster can never hold the ranks, and the ways out; None = it can."""
    fit = ranks_that_fit(nodes, bundle, placement)
    if fit >= world_size:
        return None
    how = f" with launch.placement={placement}" if placement.startswith("strict") else ""
    has = "; ".join(_amounts(node.resources, bundle) for node in nodes[:_SHOWN])
    more = f"; and {len(nodes) - _SHOWN} more" if len(nodes) > _SHOWN else ""
    return (
        f"the Ray cluster is too small for {world_size} ranks of {_amounts(bundle, bundle)} "
        f"each{how}: it holds {fit} (its {_count(len(nodes), 'node')}: {has}{more}); use a smaller "
        "mesh, lower launch.cpus_per_rank or launch.resources_per_rank, or add nodes "
        "(launch.wait_for_nodes=true waits for an autoscaler to do so)"
    )


def waiting_words(bundle: Mapping[str, float], world_size: int, free: Mapping[str, float]) -> str:
    """What is waited for while others use the cluster."""
    need = {name: amount * world_size for name, amount in bundle.items()}
    return (
        f"waiting for room in the Ray cluster: {_amounts(need, need)} needed, "
        f"{_amounts(free, need)} free now"
    )


def rank_order(bundle_nodes: Sequence[Node], label: str | None) -> list[int]:
    """The bundle of each rank: ranks of one node, host and failure domain are consecutive.

    Domains, hosts and nodes with more ranks come first, so that groups of neighbours (tensor
    parallelism) are cut as late as possible; ties keep Ray's order.

    Args:
        bundle_nodes: for every bundle of the placement group, where Ray has put it.
        label: node label that names the failure domain; None = every node is one.
    """
    keys = [(failure_domain(node, label), node.address, node.node_id) for node in bundle_nodes]

    def place(bundle: int) -> tuple[tuple[int, int], ...]:
        levels = []
        for depth in range(3):
            group = keys[bundle][: depth + 1]
            members = [index for index, key in enumerate(keys) if key[: depth + 1] == group]
            levels.append((-len(members), members[0]))
        return (*levels, (bundle, bundle))

    return sorted(range(len(keys)), key=place)


def failure_domain(node: Node, label: str | None) -> str:
    """What fails together with a node."""
    return node.node_id if label is None else node.labels.get(label, node.node_id)


def seats_of(rank_nodes: Sequence[Node], label: str | None) -> tuple[Seat, ...]:
    """A seat per rank, from the node of each; ranks of one address share a host."""
    sizes: dict[str, int] = {}
    local_ranks = []
    for node in rank_nodes:
        local_ranks.append(sizes.get(node.address, 0))
        sizes[node.address] = local_ranks[-1] + 1
    return tuple(
        Seat(
            host=node.hostname,
            local_rank=local_rank,
            local_world_size=sizes[node.address],
            node=node.node_id,
            failure_domain=failure_domain(node, label),
        )
        for node, local_rank in zip(rank_nodes, local_ranks, strict=True)
    )


def why_it_died(
    message: str, node: Node, *, node_answers: bool, begun: bool, out_of_memory: bool
) -> str | None:
    """How a rank ended whose actor is dead, to follow 'rank N'; None = something killed it.

    Args:
        message: of Ray's error.
        node_answers: the raylet of the actor's node still listens.
        begun: the actor was created; else ``message`` ends with what went wrong there.
        out_of_memory: Ray itself killed it, because the node's memory ran out.
    """
    if not begun:
        last = one_line(message.strip().rpartition("\n")[2])
        return (
            f"cannot be started on node {node.name} ({last}): install there, as here, everstep and "
            "what it needs"
        )
    if out_of_memory:
        return f"was killed by Ray because the memory of node {node.name} ran out: {LESS_MEMORY}"
    if not node_answers or any(words in message for words in _NODE_DIED):
        return lost_with_node(node)
    return None


def lost_with_node(node: Node) -> str:
    """How a rank ended whose node is gone; follows 'rank N'."""
    return (
        f"went down with node {node.name}, which died or was cut off: the same command goes on "
        "from the last checkpoint when there are nodes enough"
    )


def version_difference(ours: Mapping[str, str], theirs: Mapping[str, str], node: str) -> str | None:
    """A sentence about the first library whose version differs on a node; None = all agree.

    A version that is empty stands for a library that is missing.
    """
    for library, version in ours.items():
        found = theirs.get(library, "")
        if found != version:
            has = f"has {library} {found}" if found else f"has no {library}"
            return (
                f"node {node} {has}, and this command runs with {library} {version}: install the "
                "same on all nodes"
            )
    return None


def _amounts(amounts: Mapping[str, float], names: Mapping[str, float]) -> str:
    return ", ".join(f"{amounts.get(name, 0):g} {name}" for name in names)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
