"""How much host memory the snapshots of a run take: from the config alone (pure).

A snapshot holds the fp32 parameters and both moments of AdamW, each element once over all ranks:
what replicas have in common is shared out among them.
"""

from dataclasses import dataclass

from everstep.checkpoint.snapshots.slots import slots_needed
from everstep.trainer.config import CheckpointConfig, RunConfig
from everstep.trainer.mesh_shape import MeshShape
from everstep.trainer.model_shape import ModelShape
from everstep.trainer.pipeline_plan import count_stages, split_stages

SAVED_BYTES_PER_PARAMETER = 12
"""fp32 parameter and both moments."""
BUDGET_SHARE = 0.8
"""Of the memory that is available when a run begins, where the config sets no budget."""
_RANK_BYTES = 2**17
"""Of a slot beside its tensors: the seal, the vote, the pack's header and checksums."""


@dataclass(frozen=True, kw_only=True)
class SnapshotMemory:
    """Host memory for the snapshots on one node."""

    snapshot_bytes: int
    """One snapshot of all ranks of the node."""
    rank_bytes: int
    """One snapshot of the rank that has most."""
    slots: int
    """Snapshots that are held at once."""

    @property
    def node_bytes(self) -> int:
        """All slots of all ranks of the node."""
        return self.slots * self.snapshot_bytes


def snapshot_memory(
    config: RunConfig, model: ModelShape, shape: MeshShape, ranks: int
) -> SnapshotMemory | None:
    """What ``ranks`` ranks on one node need for snapshots; None where the run takes none.

    Buffers are not counted; they are small.
    """
    if config.checkpoint.memory is None:
        return None
    sharing = shape.world_size // shape.pp
    largest = max(_stage_parameters(config, model, shape.pp))
    rank_bytes = -(-largest * SAVED_BYTES_PER_PARAMETER // sharing) + _RANK_BYTES
    whole = model.parameters * SAVED_BYTES_PER_PARAMETER + shape.world_size * _RANK_BYTES
    return SnapshotMemory(
        snapshot_bytes=min(ranks * rank_bytes, whole),
        rank_bytes=rank_bytes,
        slots=slots_of(config.checkpoint),
    )


def slots_of(checkpoint: CheckpointConfig) -> int:
    """How many snapshots a rank holds at once: one more where one may be on its way to storage."""
    flushes = checkpoint.every_steps > 0 or checkpoint.every_s is not None
    return slots_needed(flush=flushes, protect=False)


def snapshot_budget(checkpoint: CheckpointConfig, available_bytes: int) -> int:
    """Most memory that the snapshots of one node may take, of what is available there now."""
    if checkpoint.memory_budget_bytes is not None:
        return checkpoint.memory_budget_bytes
    return int(BUDGET_SHARE * available_bytes)


def _stage_parameters(config: RunConfig, model: ModelShape, pp: int) -> list[int]:
    """Parameters of each pipeline rank; tied embeddings are on the first and the last."""
    n_stages = count_stages(config.parallel, pp)
    block, embedding = model.layer_matrices + 2 * model.dim, model.vocab_size * model.dim
    counts = [0] * pp
    for span in split_stages(model, config.data.seq_len, n_stages):
        tied_here = model.tie_embeddings and span.first and span.last
        ends = span.first * embedding + span.last * (model.dim + (not tied_here) * embedding)
        counts[span.index % pp] += len(span.layers) * block + ends
    return counts
