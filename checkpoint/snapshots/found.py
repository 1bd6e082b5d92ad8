"""What slots hold that another process has left (no torch)."""

from collections.abc import Iterable, Mapping

from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.lineage import Generation
from everstep.checkpoint.snapshots.slot_format import owner_digest, read_seal
from everstep.checkpoint.snapshots.slots import Slots, SlotState


def found_slots(
    memories: Iterable[ByteArray],
    rank: int,
    world_size: int,
    generations: Mapping[int, Generation],
) -> Slots:
    """The snapshots of this rank, as far as one of these generations made them."""
    states = []
    for memory in memories:
        seal = read_seal(memory)
        generation = None if seal is None else generations.get(seal.step_id.generation)
        ours = (
            seal is not None
            and (seal.rank, seal.world_size) == (rank, world_size)
            and generation is not None
            and owner_digest(generation.owner) == seal.owner
        )
        states.append(SlotState(seal.step_id, sealed=True) if seal and ours else SlotState())
    return tuple(states)
