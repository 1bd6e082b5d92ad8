"""The part of ``everstep doctor CONFIG`` that asks whether snapshots fit into memory and limits."""

from everstep import machine
from everstep.doctor import Facts, Finding, Status
from everstep.trainer.config import RunConfig
from everstep.trainer.mesh_shape import MeshShape
from everstep.trainer.snapshot_memory import SnapshotMemory, snapshot_budget
from everstep.words import plural, size_words

_FILES = 64
"""Open files of a keeper without ranks."""
_FILES_PER_RANK = 8
_ROOM = 0.8
"""Most of the memory that state and snapshots may take; activations need some too."""


def diagnose_snapshots(
    config: RunConfig,
    memory: SnapshotMemory,
    shape: MeshShape,
    training_bytes: int,
    device: str,
    facts: Facts,
) -> list[Finding]:
    """Judge whether this host, as the only node, can hold the snapshots of a run.

    Args:
        training_bytes: host memory that training needs besides, activations apart.
        device: what ranks train on, 'cpu' or 'cuda'.
    """
    findings = [_memory(config, memory, training_bytes, facts), _numa(facts)]
    if device == "cuda":
        findings.append(_registered(memory, facts))
    if config.checkpoint.memory == "keeper":
        findings += [_files(memory, shape, facts), _interface(config, facts)]
    return findings


def _memory(
    config: RunConfig, memory: SnapshotMemory, training_bytes: int, facts: Facts
) -> Finding:
    name = "snapshot memory"
    available = facts.memory.available_bytes
    have = min(available, facts.memory.limit_bytes or available)
    budget = snapshot_budget(config.checkpoint, have)
    found = (
        f"{size_words(memory.node_bytes)}: {memory.slots} snapshots of "
        f"{size_words(memory.snapshot_bytes)}, at most {size_words(memory.rank_bytes)} per rank"
    )
    fewer = "" if memory.slots == 2 else ", checkpoint.every_steps=0 (one snapshot less at a time)"
    ways = f"shard over more nodes{fewer}, or checkpoint.memory=null (training waits for saves)"
    if memory.node_bytes > budget:
        own = config.checkpoint.memory_budget_bytes is not None
        who = "checkpoint.memory_budget_bytes allows" if own else "by default a run may take"
        return Finding(name, Status.FAIL, found, f"{who} {size_words(budget)}: raise it, {ways}")
    if memory.node_bytes + training_bytes > _ROOM * have:
        limit = facts.memory.limit_bytes
        where = "the control group allows" if limit and limit <= available else "available are"
        besides = f", and training needs {size_words(training_bytes)}" if training_bytes else ""
        return Finding(name, Status.FAIL, found, f"{where} {size_words(have)}{besides}: {ways}")
    return Finding(name, Status.OK, found)


def _numa(facts: Facts) -> Finding:
    sizes = facts.numa_bytes
    if len(sizes) <= 1:
        return Finding("NUMA", Status.OK, "one node: all memory is equally near")
    found = f"{len(sizes)} nodes: {', '.join(map(size_words, sizes))}"
    if max(sizes) > 2 * min(sizes):
        advice = "some nodes have much less memory: snapshots of ranks there may lie farther away"
        return Finding("NUMA", Status.WARN, found, advice)
    return Finding("NUMA", Status.OK, found)


def _registered(memory: SnapshotMemory, facts: Facts) -> Finding:
    """Drivers differ in whether what a GPU may copy to counts as locked memory."""
    soft, _ = facts.limits.locked_bytes
    name, found = "registered memory", f"{size_words(memory.node_bytes)} for copies from the GPUs"
    if soft != machine.UNLIMITED and soft < memory.node_bytes:
        advice = (
            f"locked memory is limited to {size_words(soft)}: ulimit -l unlimited (a container: "
            "--ulimit memlock=-1), if the driver refuses to register it"
        )
        return Finding(name, Status.WARN, found, advice)
    return Finding(name, Status.OK, found)


def _files(memory: SnapshotMemory, shape: MeshShape, facts: Facts) -> Finding:
    need = _FILES + shape.world_size * (_FILES_PER_RANK + 2 * memory.slots)
    soft, hard = facts.limits.open_files
    found = f"the keeper of {plural(shape.world_size, 'rank')} opens at most {need}"
    if soft != machine.UNLIMITED and soft < need:
        more = hard == machine.UNLIMITED or hard >= need
        advice = f"only {soft} are allowed: ulimit -n {need}"
        return Finding("keeper files", Status.WARN if more else Status.FAIL, found, advice)
    return Finding("keeper files", Status.OK, found)


def _interface(config: RunConfig, facts: Facts) -> Finding:
    name, wanted = "keeper network", config.checkpoint.keeper_interface
    if wanted is None:
        found = "none on one host; in a Ray cluster that of the node's address"
        return Finding(name, Status.OK, found)
    known = {interface.name: interface.address for interface in facts.interfaces}
    if wanted not in known:
        advice = f"checkpoint.keeper_interface: there are {', '.join(known) or 'none'} here"
        return Finding(name, Status.FAIL, f"{wanted} is not there", advice)
    address = known[wanted]
    if address is None:
        advice = "checkpoint.keeper_interface: bring it up, or choose one with an address"
        return Finding(name, Status.FAIL, f"{wanted} has no IPv4 address", advice)
    if address.startswith("127."):
        advice = "no other node can be reached from there: choose the interface of the cluster"
        return Finding(name, Status.WARN, f"{wanted}, {address}", advice)
    return Finding(name, Status.OK, f"{wanted}, {address}")
